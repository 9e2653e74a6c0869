// See qwen1m/job.h. In C++ and not in Python, because a beat must not wait for the interpreter's lock, which any call
// into C may hold for minutes, and because only a handler of on_exit knows the status that a process really ends with.
// That is glibc's; Paddle has no wheels for another libc.
#include "qwen1m/job.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "progress.h"

namespace qwen1m {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr double kFarewellSeconds = 1.0;

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
}

struct Peer {
  const int fd;
  std::timed_mutex sending;
  std::string unsent;

  explicit Peer(int fd) : fd(fd) {}

  // Sends what is unsent until the deadline; 0 or an errno. The caller holds `sending`.
  int flush(Clock::time_point deadline) {
    while (!unsent.empty()) {
      const ssize_t sent = send(fd, unsent.data(), unsent.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent >= 0) {
        unsent.erase(0, static_cast<size_t>(sent));
        continue;
      }
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return errno;
      const double left = Seconds(deadline - Clock::now()).count();
      if (left <= 0) return ETIMEDOUT;
      pollfd writable{fd, POLLOUT, 0};
      poll(&writable, 1, left < 1 ? 1 + static_cast<int>(left * 1000) : 1000);
    }
    return 0;
  }
};

struct Job {
  std::mutex mutex;  // of all that follows, never held while something is sent
  std::vector<std::shared_ptr<Peer>> peers;
  double interval = 1.0;
  pid_t pid = getpid();
  bool beating = false, ended = false;

  std::vector<std::shared_ptr<Peer>> now() {
    const std::lock_guard<std::mutex> lock(mutex);
    return ended ? std::vector<std::shared_ptr<Peer>>{} : peers;
  }
};

// Never destroyed: its thread outlives the static objects of a process that ends.
Job& job() {
  static Job& only = *new Job;
  return only;
}

std::string frame(const char* head, const qwen1m_progress& progress) {
  char text[160];
  const int length =
      snprintf(text, sizeof text, "{%s, \"work\": %lld, \"entered\": %lld, \"busy\": %d}", head,
               static_cast<long long>(progress.work), static_cast<long long>(progress.entered), progress.busy);
  std::string out;
  for (int byte = 0; byte < 8; ++byte) out += static_cast<char>(static_cast<uint64_t>(length) >> (8 * byte));
  return out + text;
}

// Beats wait for nobody: a peer whose buffer is full, or to whom a long frame is on its way, gets the next one.
void beat() {
  for (;;) {
    double interval;
    {
      const std::lock_guard<std::mutex> lock(job().mutex);
      if (job().ended) return;
      interval = job().interval;
    }
    qwen1m_progress progress;
    qwen1m_read_progress(&progress);
    const std::string now = frame("\"kind\": \"beat\"", progress);
    for (const auto& peer : job().now()) {
      const std::unique_lock<std::timed_mutex> lock(peer->sending, std::try_to_lock);
      if (!lock || peer->flush(Clock::now()) != 0) continue;
      peer->unsent = now;
      peer->flush(Clock::now());
    }
    std::this_thread::sleep_for(Seconds(interval));
  }
}

void send_last_frame(int status, void*) {
  if (getpid() != job().pid) {  // a forked child, where the destructors of gloo would wait for threads of the rank
    fflush(nullptr);
    _exit(status);
  }
  const auto deadline = after(kFarewellSeconds);
  const auto peers = job().now();
  {
    const std::lock_guard<std::mutex> lock(job().mutex);
    job().ended = true;
  }
  if (peers.empty()) return;
  char head[64];
  snprintf(head, sizeof head, "\"kind\": \"exit\", \"status\": %d", status & 0xff);
  const std::string last = frame(head, known_progress());
  for (const auto& peer : peers) {
    const std::unique_lock<std::timed_mutex> lock(peer->sending, deadline);
    if (!lock) continue;
    peer->unsent += last;
    peer->flush(deadline);
    // A socket that is closed with something left to read resets its connection, which may overtake the last frame.
    shutdown(peer->fd, SHUT_WR);
    char unread[4096];
    while (recv(peer->fd, unread, sizeof unread, MSG_DONTWAIT) > 0) continue;
  }
}

void before_fork() { job().mutex.lock(); }
void after_fork_in_parent() { job().mutex.unlock(); }

// The child is no rank. Its copies of the sockets would keep the connections open after the rank's death: their numbers
// stay taken, for whoever closes them, but lead nowhere.
void after_fork_in_child() {
  const int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (const auto& peer : job().peers) dup3(nowhere, peer->fd, O_CLOEXEC);
  close(nowhere);
  new std::vector<std::shared_ptr<Peer>>(std::move(job().peers));  // a mutex among them may be locked: kept for good
  job().peers.clear();
  job().beating = false;
  job().mutex.unlock();
}

void start_beating() {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of Python
  std::thread(beat).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

std::shared_ptr<Peer> find(int fd) {
  const std::lock_guard<std::mutex> lock(job().mutex);
  for (const auto& peer : job().peers) {
    if (peer->fd == fd) return peer;
  }
  return nullptr;
}

}  // namespace

void tell_exit_first() {
  job();
  on_exit(send_last_frame, nullptr);
}

}  // namespace qwen1m

using namespace qwen1m;

void qwen1m_open_peer(int fd, double seconds) {
  static const bool registered = [] {
    tell_exit_first();
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    return true;
  }();
  (void)registered;
  const std::lock_guard<std::mutex> lock(job().mutex);
  job().pid = getpid();
  job().interval = seconds;
  job().peers.push_back(std::make_shared<Peer>(fd));
  if (!job().beating) start_beating();
  job().beating = true;
}

void qwen1m_close_peer(int fd) {
  const std::shared_ptr<Peer> peer = find(fd);
  if (!peer) return;
  {
    const std::lock_guard<std::mutex> lock(job().mutex);
    auto& peers = job().peers;
    for (size_t i = 0; i < peers.size(); ++i) {
      if (peers[i] == peer) peers.erase(peers.begin() + static_cast<int64_t>(i--));
    }
  }
  const std::lock_guard<std::timed_mutex> lock(peer->sending);  // a beat that is on its way has gone
}

int qwen1m_send_to_peer(int fd, const char* frame, int64_t size, double seconds) {
  const std::shared_ptr<Peer> peer = find(fd);
  if (!peer) return EBADF;
  const auto deadline = after(seconds);
  const std::unique_lock<std::timed_mutex> lock(peer->sending, deadline);
  if (!lock) return EBUSY;
  peer->unsent.append(frame, static_cast<size_t>(size));
  return peer->flush(deadline);
}
