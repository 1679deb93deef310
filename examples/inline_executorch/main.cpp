// Drives an inline bundle with nothing but the ExecuTorch C++ runtime: greedy tokens, the paged cache as plain buffers.
// All tokens stay in `recent_keys` and `recent_values`, in half precision, and there is no page; an app also quantises full
// pages into INT8, as docs/contract.md says.
//     generate model.pte N_LAYERS N_KV_HEADS HEAD_DIM PAGE_SIZE COUNT TOKEN [TOKEN ...]
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace executorch::extension;
using executorch::aten::Half;
using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::Span;

int main(int argc, char** argv) {
    if (argc < 8) return std::fprintf(stderr, "arguments: see the first lines of main.cpp\n"), 2;
    const int n_layers = std::atoi(argv[2]), heads = std::atoi(argv[3]), dim = std::atoi(argv[4]);
    const int page_size = std::atoi(argv[5]), count = std::atoi(argv[6]), width = heads * dim;
    std::vector<int64_t> tokens;
    for (int i = 7; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
    const size_t end = tokens.size() + count;

    Module module(argv[1], Module::LoadMode::Mmap);
    // Memory is planned for the longest context. A Module would fill it with zeros; a mapping costs what a step touches.
    const auto meta = module.method_meta("decode");
    if (!meta.ok()) return std::fprintf(stderr, "%s cannot be loaded\n", argv[1]), 1;
    std::vector<Span<uint8_t>> room;
    for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
        const size_t size = std::max<size_t>(1, *meta->memory_planned_buffer_size(i));
        void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED) return std::perror("mmap"), 1;
        room.emplace_back(static_cast<uint8_t*>(start), size);
    }
    HierarchicalAllocator memory({room.data(), room.size()});
    if (module.load_method("decode", &memory) != Error::Ok) return std::fprintf(stderr, "no method decode\n"), 1;

    // The program writes its outputs into buffers of ours, as large as its description says.
    std::vector<std::vector<float>> results;
    for (size_t i = 0; i < meta->num_outputs(); ++i) {
        const auto sizes = meta->output_tensor_meta(i)->sizes();
        results.emplace_back(meta->output_tensor_meta(i)->nbytes() / sizeof(float));
        const auto tensor = from_blob(results[i].data(), {sizes.begin(), sizes.end()});
        if (module.set_output("decode", *tensor, i) != Error::Ok) return 1;
    }

    std::vector<std::vector<Half>> keys(n_layers), values(n_layers);  // [tokens, heads, dim]
    std::vector<int64_t> positions;                                   // of the tokens in them
    int64_t row = 0;  // the number, among the new tokens, of the one whose logits are wanted
    uint8_t none[1];  // where the pages would be

    for (int64_t position = 0; tokens.size() < end; ++position) {
        const int recent = static_cast<int>(position);
        std::vector<TensorPtr> alive;
        std::vector<EValue> inputs;
        const auto add = [&](void* data, std::vector<executorch::aten::SizesType> sizes, ScalarType type) {
            alive.push_back(from_blob(data, std::move(sizes), type));
            inputs.emplace_back(*alive.back());
        };
        add(&tokens[position], {1}, ScalarType::Long);
        add(&position, {1}, ScalarType::Long);
        add(&row, {1}, ScalarType::Long);
        for (int layer = 0; layer < n_layers; ++layer) {
            add(none, {0, heads, dim, page_size}, ScalarType::Char);
            add(none, {0, heads, dim}, ScalarType::Half);
            add(none, {0, heads, page_size, dim}, ScalarType::Char);
            add(none, {0, heads, page_size}, ScalarType::Half);
            add(none, {0, page_size}, ScalarType::Long);
            add(keys[layer].data(), {recent, heads, dim}, ScalarType::Half);
            add(values[layer].data(), {recent, heads, dim}, ScalarType::Half);
            add(positions.data(), {recent}, ScalarType::Long);
        }
        const auto outputs = module.execute("decode", inputs);
        if (!outputs.ok()) return std::fprintf(stderr, "error 0x%x\n", unsigned(outputs.error())), 1;
        for (int layer = 0; layer < n_layers; ++layer) {
            for (int part = 0; part < 2; ++part) {
                auto& cache = part == 0 ? keys[layer] : values[layer];
                const float* fresh = results[1 + 3 * layer + part].data();
                cache.insert(cache.end(), fresh, fresh + width);
            }
        }
        positions.push_back(position);
        if (position + 1 < int64_t(tokens.size())) continue;  // still reading the prompt
        tokens.push_back(std::max_element(results[0].begin(), results[0].end()) - results[0].begin());
        std::printf("%lld%c", (long long)tokens.back(), tokens.size() < end ? ' ' : '\n');
    }
}
