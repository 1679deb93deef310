// Rows read by threads that wait for the system, each for one read at a time.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <thread>

#include "records/reader.h"

namespace edgekv {
namespace {

class ThreadRows final : public RecordReader {
  public:
    ThreadRows(const Kernels& kernels, int n_threads) : RecordReader(kernels) {
        for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
    }

    ~ThreadRows() override {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
            queue_.clear();
        }
        work_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    const char* how() const override { return "threads"; }

  protected:
    void start(const std::vector<Run>& runs) override {
        queue_.insert(queue_.end(), runs.begin(), runs.end());
        if (runs.size() == 1) {
            work_.notify_one();
        } else {
            work_.notify_all();
        }
    }

    void finish(Open& open, std::unique_lock<std::mutex>& lock) override {
        done_.wait(lock, [&] { return open.left == 0; });
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this] { return ends_ || !queue_.empty(); });
            if (ends_) return;
            Run run = queue_.front();
            queue_.pop_front();
            lock.unlock();
            const int error = read(run);
            lock.lock();
            done(run, error);
            if (run.open->left == 0) done_.notify_all();
        }
    }

    static int read(Run& run) {
        while (run.missing()) {
            const auto count =
                ::pread(run.open->request.file, run.at(), static_cast<size_t>(run.missing()), static_cast<off_t>(run.offset()));
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) return errno;
            if (count == 0) break;  // the file ends here
            run.got += count;
        }
        return 0;
    }

    std::condition_variable work_, done_;
    std::deque<Run> queue_;
    bool ends_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<RecordReader> open_threads(const Kernels& kernels, int n_threads) {
    return std::make_unique<ThreadRows>(kernels, n_threads);
}

}  // namespace edgekv
