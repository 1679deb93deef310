// The threads of ONNX Runtime's global pool, lent to our kernels.
#pragma once

#include "thread_pool.h"

namespace edgekv {

// Null until ONNX Runtime called RegisterCustomOps of this library, or if it is too old or has no global pool.
ThreadPool::Executor onnxruntime_executor();

}  // namespace edgekv
