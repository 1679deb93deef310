// ONNX Runtime lends its threads to operators only. So the executor runs a session of one operator, whose work is the
// task: a few microseconds per job, where waking threads of our own takes fifty.
#include "onnxruntime_threads.h"

#include <memory>

#include "onnxruntime_api.h"

namespace edgekv {
namespace {

using namespace onnx;

constexpr int kWarning = 2, kArenaAllocator = 1;

struct Job {
    ThreadPool::Task task;
    void* context;
    size_t count;
};

// The job of the thread that runs the session: a session runs its operators on the calling thread.
thread_local const Job* job = nullptr;

struct ForkOp : CustomOp {
    ForkOp() {
        name = [](const CustomOp*) { return "Fork"; };
        create = [](const CustomOp*, Table, const void*, void** kernel) {
            static char no_state;
            *kernel = &no_state;
            return Status{};
        };
        compute = [](void*, void* context) {
            const Job* now = job;
            if (!now) return Status{};
            const Status status =
                call<kKernelContextParallelFor>(context, now->task, now->count, size_t{0}, now->context);
            if (!status) job = nullptr;  // done
            return status;
        };
    }
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
        static const ForkOp op;
        void *env = nullptr, *domain = nullptr, *options = nullptr, *memory = nullptr;
        const int64_t shape[] = {1};
        const char* const id = "edgekv";
        bool good = ok(call<kCreateEnv>(kWarning, id, &env)) && ok(call<kCreateSessionOptions>(&options)) &&
                    ok(call<kDisablePerSessionThreads>(options)) && ok(call<kCreateCustomOpDomain>(id, &domain)) &&
                    ok(call<kCustomOpDomainAdd>(domain, static_cast<const CustomOp*>(&op))) && ok(call<kAddCustomOpDomain>(options, domain)) &&
                    ok(call<kCreateCpuMemoryInfo>(kArenaAllocator, 0, &memory));
        for (int i = 0; good && i < 2; ++i) {
            good = ok(call<kCreateTensorWithData>(static_cast<const void*>(memory), static_cast<void*>(&data[i]),
                                                  sizeof(float), shape, size_t{1}, int{kFloat}, &values[i]));
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
