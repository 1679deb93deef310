// ONNX Runtime lends its threads to operators only. So the executor runs a session of one operator, whose work is the
// task: a few microseconds per job, where waking threads of our own takes fifty.
//
// Declared here is the small part of onnxruntime_c_api.h that this needs, by position in its table of functions. The
// table only ever grows at its end; an older library says that it does not know version 17.
#include "onnxruntime_threads.h"

#include <cstdint>
#include <memory>

#if defined(_WIN32)
#define EDGEKV_EXPORT __declspec(dllexport)
#else
#define EDGEKV_EXPORT __attribute__((visibility("default")))
#endif

namespace edgekv {
namespace {

constexpr uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor
constexpr int kFloat = 1, kWarning = 2, kArenaAllocator = 1;

using Table = void* const*;
using Status = void*;  // null is success

struct ApiBase {
    Table (*get_api)(uint32_t version);
    const char* (*get_version)();
};

Table api = nullptr;

// Calls the function at a position of the table.
template <int kPosition, typename Result = Status, typename... Args>
Result call(Args... args) {
    return reinterpret_cast<Result (*)(Args...)>(api[kPosition])(args...);
}

enum Position {
    kCreateEnv = 3,
    kCreateSessionFromArray = 8,
    kRun = 9,
    kCreateSessionOptions = 10,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kCreateTensorWithData = 49,
    kCreateCpuMemoryInfo = 69,
    kReleaseStatus = 93,
    kDisablePerSessionThreads = 120,
    kKernelContextParallelFor = 274,
};

bool ok(Status status) {
    if (status) call<kReleaseStatus, void>(status);
    return !status;
}

struct Job {
    ThreadPool::Task task;
    void* context;
    size_t count;
};

// The job of the thread that runs the session: a session runs its operators on the calling thread.
thread_local const Job* job = nullptr;

// struct OrtCustomOp as of version 12: later fields are not read.
struct CustomOp {
    uint32_t version = 12;
    void* (*create)(const CustomOp*, Table, const void*) = [](const CustomOp* self, Table, const void*) {
        return const_cast<void*>(static_cast<const void*>(self));
    };
    const char* (*name)(const CustomOp*) = [](const CustomOp*) { return "Fork"; };
    const char* (*provider)(const CustomOp*) = [](const CustomOp*) -> const char* { return nullptr; };
    int (*input_type)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return kFloat; };
    size_t (*input_count)(const CustomOp*) = [](const CustomOp*) { return size_t{1}; };
    int (*output_type)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return kFloat; };
    size_t (*output_count)(const CustomOp*) = [](const CustomOp*) { return size_t{1}; };
    void (*compute)(void*, void*) = [](void*, void* context) {
        const Job* now = job;
        if (!now || !ok(call<kKernelContextParallelFor>(context, now->task, now->count, size_t{0}, now->context))) return;
        job = nullptr;  // done
    };
    void (*destroy)(void*) = [](void*) {};
    int (*input_kind)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return 0; };
    int (*output_kind)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return 0; };
};

// A model of one node: y = edgekv.Fork(x), both float [1].
constexpr char kModel[] =
    "\x08\x08"                                                          // ir_version 8
    "\x3a\x3e"                                                          // graph
    "\x0a\x14" "\x0a\x01x" "\x12\x01y" "\x22\x04" "Fork" "\x3a\x06" "edgekv"  // node: input, output, op_type, domain
    "\x12\x04" "fork"                                                   // name
    "\x5a\x0f" "\x0a\x01x" "\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  // input
    "\x62\x0f" "\x0a\x01y" "\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  // output
    "\x42\x02\x10\x11"                                                  // opset 17
    "\x42\x0a" "\x0a\x06" "edgekv" "\x10\x01";

struct Session {
    void* handle = nullptr;
    void* values[2] = {nullptr, nullptr};
    float data[2] = {0.f, 0.f};

    Session() {
        static const CustomOp op;
        void *env = nullptr, *domain = nullptr, *options = nullptr, *memory = nullptr;
        const int64_t shape[] = {1};
        const char* const id = "edgekv";
        bool good = ok(call<kCreateEnv>(kWarning, id, &env)) && ok(call<kCreateSessionOptions>(&options)) &&
                    ok(call<kDisablePerSessionThreads>(options)) && ok(call<kCreateCustomOpDomain>(id, &domain)) &&
                    ok(call<kCustomOpDomainAdd>(domain, &op)) && ok(call<kAddCustomOpDomain>(options, domain)) &&
                    ok(call<kCreateCpuMemoryInfo>(kArenaAllocator, 0, &memory));
        for (int i = 0; good && i < 2; ++i) {
            good = ok(call<kCreateTensorWithData>(static_cast<const void*>(memory), static_cast<void*>(&data[i]),
                                                  sizeof(float), shape, size_t{1}, kFloat, &values[i]));
        }
        if (good) {
            void* session = nullptr;
            good = ok(call<kCreateSessionFromArray>(static_cast<const void*>(env), static_cast<const void*>(kModel),
                                                    sizeof kModel - 1, static_cast<const void*>(options), &session));
            if (good) handle = session;
        }
    }
};


// Made once there is a global pool, and never released: that pool lives as long as the process.
Session* lender = nullptr;

bool execute(ThreadPool::Task task, void* context, size_t count) {
    static const char* const inputs[] = {"x"};
    static const char* const outputs[] = {"y"};
    Session& one = *lender;
    const Job now{task, context, count};
    job = &now;
    const void* const values[] = {one.values[0]};
    void* results[] = {one.values[1]};
    const bool ran = ok(call<kRun>(one.handle, static_cast<const void*>(nullptr), inputs, values, size_t{1}, outputs,
                                   size_t{1}, results));
    const bool done = ran && !job;
    job = nullptr;
    return done;
}

}  // namespace

// Called with the GIL held.
ThreadPool::Executor onnxruntime_executor() {
    if (api && !lender) {
        auto made = std::make_unique<Session>();
        if (made->handle) lender = made.release();
    }
    return lender ? execute : nullptr;
}

}  // namespace edgekv

// What SessionOptions.register_custom_ops_library calls. It adds no operator to those sessions: it tells where the
// functions of the ONNX Runtime in this process are.
extern "C" EDGEKV_EXPORT void* RegisterCustomOps(void*, const void* base) {
    edgekv::api = static_cast<const edgekv::ApiBase*>(base)->get_api(edgekv::kApiVersion);
    return nullptr;
}
