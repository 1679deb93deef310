// Drives an inline bundle with nothing but the ExecuTorch C++ runtime: greedy tokens, the paged cache as plain buffers.
// All tokens stay in `recent_keys` and `recent_values`, in half precision; an app also quantises full pages into INT8, as
// docs/contract.md says. The two pages that the program wants at the least are masked here.
//     generate model.pte N_LAYERS N_KV_HEADS HEAD_DIM PAGE_SIZE COUNT TOKEN [TOKEN ...]
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

using namespace executorch::extension;
using executorch::aten::Half;
using executorch::aten::ScalarType;
using executorch::runtime::EValue;

int main(int argc, char** argv) {
    if (argc < 8) return std::fprintf(stderr, "arguments: see the first lines of main.cpp\n"), 2;
    const int n_layers = std::atoi(argv[2]), heads = std::atoi(argv[3]), dim = std::atoi(argv[4]);
    const int page_size = std::atoi(argv[5]), count = std::atoi(argv[6]), pages = 2, width = heads * dim;
    std::vector<int64_t> tokens;
    for (int i = 7; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
    const size_t end = tokens.size() + count;

    Module module(argv[1], Module::LoadMode::Mmap);
    std::vector<int8_t> codes(pages * page_size * width);
    std::vector<Half> key_scales(pages * width), value_scales(pages * heads * page_size);
    std::vector<std::vector<Half>> keys(n_layers), values(n_layers);  // [tokens, heads, dim]

    // The program writes its outputs into buffers of ours, as large as its description says.
    const auto meta = module.method_meta("decode");
    if (!meta.ok()) return std::fprintf(stderr, "%s cannot be loaded\n", argv[1]), 1;
    std::vector<std::vector<float>> results;
    for (size_t i = 0; i < meta->num_outputs(); ++i) {
        const auto sizes = meta->output_tensor_meta(i)->sizes();
        results.emplace_back(meta->output_tensor_meta(i)->nbytes() / sizeof(float));
        const auto tensor = from_blob(results[i].data(), {sizes.begin(), sizes.end()});
        if (module.set_output("decode", *tensor, i) != executorch::runtime::Error::Ok) return 1;
    }

    for (int64_t position = 0; tokens.size() < end; ++position) {
        const int recent = std::max<int>(2, position), slots = pages * page_size + recent;
        auto mask = std::make_unique<bool[]>(slots);  // false: nobody may look there
        std::fill_n(mask.get() + pages * page_size, position, true);
        std::vector<TensorPtr> alive;
        std::vector<EValue> inputs;
        const auto add = [&](void* data, std::vector<executorch::aten::SizesType> sizes, ScalarType type) {
            alive.push_back(from_blob(data, std::move(sizes), type));
            inputs.emplace_back(*alive.back());
        };
        add(&tokens[position], {1}, ScalarType::Long);
        add(&position, {1}, ScalarType::Long);
        for (int layer = 0; layer < n_layers; ++layer) {
            for (auto* cache : {&keys[layer], &values[layer]}) cache->resize(recent * width);
            add(codes.data(), {pages, heads, page_size, dim}, ScalarType::Char);
            add(key_scales.data(), {pages, heads, dim}, ScalarType::Half);
            add(codes.data(), {pages, heads, page_size, dim}, ScalarType::Char);
            add(value_scales.data(), {pages, heads, page_size}, ScalarType::Half);
            add(keys[layer].data(), {recent, heads, dim}, ScalarType::Half);
            add(values[layer].data(), {recent, heads, dim}, ScalarType::Half);
            add(mask.get(), {1, slots}, ScalarType::Bool);
        }
        const auto outputs = module.execute("decode", inputs);
        if (!outputs.ok()) return std::fprintf(stderr, "error 0x%x\n", unsigned(outputs.error())), 1;
        for (int layer = 0; layer < n_layers; ++layer) {
            for (int part = 0; part < 2; ++part) {
                auto& cache = part == 0 ? keys[layer] : values[layer];
                const float* fresh = results[1 + 3 * layer + part].data();
                cache.resize(position * width);
                cache.insert(cache.end(), fresh, fresh + width);
            }
        }
        if (position + 1 < int64_t(tokens.size())) continue;  // still reading the prompt
        tokens.push_back(std::max_element(results[0].begin(), results[0].end()) - results[0].begin());
        std::printf("%lld%c", (long long)tokens.back(), tokens.size() < end ? ' ' : '\n');
    }
}
