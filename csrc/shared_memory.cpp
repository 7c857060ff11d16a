// All-reduce (sum) of small vectors between the processes of one host, through memory that they share.
//
// The memory is a memfd. It has no name, so two jobs cannot meet, and nothing is left when the last process that maps
// it ends, however it ends. The first rank makes it, the others open /proc/<pid of the first>/fd/<descriptor>. Each
// rank locks one byte of it; the kernel drops the lock with the process, which is how peers know who lives.
//
// Every rank owns a slot with two buffers, used in turn. In round k it fills buffer k % 2, posts k, waits until all
// have posted k, and adds all buffers k % 2 in rank order: the same bits everywhere. One wait per round is enough: a
// rank fills a buffer again in round k+2, after it saw all ranks post k+1, which each did after it had read round k.
#include <nanobind/nanobind.h>

#ifdef __linux__
#include <fcntl.h>
#include <linux/futex.h>
#include <nanobind/stl/vector.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace nb = nanobind;

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;
using Word = std::atomic<std::uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4, "shared between processes, and a futex");

constexpr std::size_t kPage = 4096;
constexpr std::size_t kBufferBytes = 64 << 10;  // 8192 float64: a layer of 4095 channels in one round
constexpr Seconds kSpin{50e-6};                 // about what it takes to be woken on an idle machine
constexpr Seconds kYield{2e-3};                 // as long again and more: a virtual processor that idles is slow to wake
// Where others use the core, who yields gets it back when their time is up, milliseconds later; who sleeps, when woken.
constexpr Seconds kTaken{1e-3};    // between two looks: somebody else had the core
constexpr int kWary = 200;         // so many waits, from then on, go to sleep
constexpr Seconds kGlance{10e-6};  // after this time
constexpr Seconds kLook{0.1};                   // how often a sleeper looks for signals and lost peers

struct Signature {
    std::uint64_t numel, itemsize;
    std::uint64_t place;  // a digest of what the sum is for
};

enum Verdict { kAgree, kOtherPlace, kOtherVector };  // of the ranks' signatures: as in comm/_verdict.py

struct alignas(64) Slot {
    Word posted;        // the last round for which this rank filled its buffer; wraps
    Signature sent[2];  // what is in the buffers: on the cache line that the peers wait for
    alignas(64) pid_t pid;
    cpu_set_t cores;
};

struct alignas(kPage) Buffers {
    std::byte bytes[2][kBufferBytes];
};

struct Header {
    std::uint64_t token;        // random: tells our memory from any other file
    alignas(64) Word sleepers;  // ranks that sleep, or are about to
    Word bell;                  // the futex that they sleep on
};

[[noreturn]] void throw_os_error(int error, const char *what) {
    errno = error;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, what);
    throw nb::python_error();
}

struct File {
    int fd;
    ~File() { close(); }

    void close() {
        if (fd >= 0) ::close(std::exchange(fd, -1));
    }

    static int create(std::size_t bytes) {
        File file{memfd_create("syncbn", MFD_CLOEXEC)};
        if (file.fd < 0) throw_os_error(errno, "memfd_create");
        // Reserved now: memory that runs out later would be a SIGBUS.
        if (int error = posix_fallocate(file.fd, 0, off_t(bytes))) throw_os_error(error, "posix_fallocate");
        return std::exchange(file.fd, -1);
    }

    static int open_peers(pid_t pid, int fd, std::size_t bytes) {
        std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
        struct stat info;
        if (stat(path.c_str(), &info) != 0) throw_os_error(errno, path.c_str());
        if (!S_ISREG(info.st_mode) || std::size_t(info.st_size) != bytes) throw_os_error(ESTALE, path.c_str());
        int mine = open(path.c_str(), O_RDWR | O_CLOEXEC);
        if (mine < 0) throw_os_error(errno, path.c_str());
        return mine;
    }
};

struct Mapping {
    std::size_t bytes;
    std::byte *start;

    Mapping(std::size_t size, int fd) : bytes(size) {
        void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
        if (memory == MAP_FAILED) throw_os_error(errno, "mmap");
        start = static_cast<std::byte *>(memory);
    }
    ~Mapping() { close(); }

    void close() {
        if (start != nullptr) munmap(std::exchange(start, nullptr), bytes);
    }
};

class SharedMemory {
  public:
    // `ranks` is what errors call the slots, `me` is this process's slot. Slot 0 makes the memory; the others find it
    // at descriptor `fd` of process `pid`. Fresh memory is zero, which is where all fields start.
    SharedMemory(std::vector<int> ranks, std::size_t me, std::uint64_t token, pid_t pid, int fd)
        : ranks_(std::move(ranks)),
          me_(me),
          file_{me == 0 ? File::create(bytes()) : File::open_peers(pid, fd, bytes())},
          memory_(bytes(), file_.fd) {
        if (me == 0) header()->token = token;
        if (header()->token != token) throw_os_error(ESTALE, "another job's memory");
        slot(me).pid = getpid();
        sched_getaffinity(0, sizeof(cpu_set_t), &slot(me).cores);
        struct flock byte = lock_of(me);
        if (fcntl(file_.fd, F_SETLK, &byte) != 0) throw_os_error(errno, "fcntl");
    }

    SharedMemory(const SharedMemory &) = delete;

    int fd() const { return file_.fd; }

    // To be called when every rank has mapped the memory: it is known now which cores they have together.
    void start() {
        cpu_set_t cores = slot(0).cores;
        for (std::size_t r = 1; r < ranks_.size(); ++r) CPU_OR(&cores, &cores, &slot(r).cores);
        awake_ = std::size_t(CPU_COUNT(&cores)) >= ranks_.size() ? kYield : Seconds{0};
    }

    // Returns whether the ranks agree, the same on each of them. The sum is made unless their vectors differ.
    int all_reduce(std::uintptr_t data, std::size_t numel, bool is_float64, double seconds, std::uint64_t place) {
        std::lock_guard<std::mutex> one_thread_at_a_time(mutex_);
        if (memory_.start == nullptr) throw std::runtime_error("this memory was released");
        if (is_float64) return sum(reinterpret_cast<double *>(data), numel, Seconds{seconds}, place);
        return sum(reinterpret_cast<float *>(data), numel, Seconds{seconds}, place);
    }

    // This rank will post no more: the peers that wait for it are told so.
    void give_up() {
        if (memory_.start == nullptr) return;
        struct flock byte = lock_of(me_);
        byte.l_type = F_UNLCK;
        fcntl(file_.fd, F_SETLK, &byte);
        ring();
    }

    // Does so, and releases the memory once no other thread of this process sums in it.
    void close() {
        std::lock_guard<std::mutex> one_thread_at_a_time(mutex_);
        give_up();
        memory_.close();
        file_.close();
    }

  private:
    std::size_t buffers_at() const { return (kPage + ranks_.size() * sizeof(Slot) + kPage - 1) / kPage * kPage; }
    std::size_t bytes() const { return buffers_at() + ranks_.size() * sizeof(Buffers); }
    Header *header() const { return reinterpret_cast<Header *>(memory_.start); }
    Slot &slot(std::size_t r) const { return reinterpret_cast<Slot *>(memory_.start + kPage)[r]; }
    std::byte *buffer(std::size_t r) const {
        return reinterpret_cast<Buffers *>(memory_.start + buffers_at())[r].bytes[round_ % 2];
    }

    template <class T>
    Verdict sum(T *data, std::size_t numel, Seconds timeout, std::uint64_t place) {
        std::size_t start = 0;
        Verdict verdict = kAgree;
        do {
            std::size_t count = std::min(kBufferBytes / sizeof(T), numel - start);
            ++round_;
            if (count > 0) std::memcpy(buffer(me_), data + start, count * sizeof(T));
            slot(me_).sent[round_ % 2] = {numel, sizeof(T), place};
            slot(me_).posted = round_;
            wait(timeout);
            if (start == 0) verdict = compare_signatures();
            if (verdict == kOtherVector) break;  // on every rank: they stay in step
            add(data + start, count);
            start += count;
        } while (start < numel);
        return verdict;
    }

    template <class T>
    void add(T *__restrict out, std::size_t count) const {
        const T *first = reinterpret_cast<T *>(buffer(0)), *second = reinterpret_cast<T *>(buffer(1));
        for (std::size_t i = 0; i < count; ++i) out[i] = first[i] + second[i];
        for (std::size_t r = 2; r < ranks_.size(); ++r) {
            const T *next = reinterpret_cast<T *>(buffer(r));
            for (std::size_t i = 0; i < count; ++i) out[i] += next[i];
        }
    }

    bool has_posted(std::size_t r) const { return std::int32_t(slot(r).posted - round_) >= 0; }

    bool all_posted() const {
        for (std::size_t r = 0; r < ranks_.size(); ++r)
            if (!has_posted(r)) return false;
        return true;
    }

    // Of the ranks, the last to post surely finds here that all have: it rings if somebody sleeps. A sleeper counts
    // itself before its last look at the posts, and all of this is sequentially consistent: either it sees the last
    // post, or the last rank sees the sleeper.
    void wait(Seconds timeout) {
        if (all_posted()) {
            if (header()->sleepers > 0) ring();
            return;
        }
        const auto begin = Clock::now();
        const Seconds awake = wary_ > 0 ? std::min(kGlance, awake_) : awake_;
        wary_ = std::max(wary_ - 1, 0);
        bool taken = false;
        for (Seconds waited{0}, before{0}; waited <= awake && !taken; before = waited) {
            waited < kSpin ? relax() : void(sched_yield());  // to whoever else wants the core
            const bool posted = all_posted();
            waited = Clock::now() - begin;
            taken = waited - before > kTaken;
            if (taken) wary_ = kWary;
            if (posted) return;
        }
        sleep_until_all_posted(begin, timeout);
    }

    void sleep_until_all_posted(Clock::time_point begin, Seconds timeout) {
        struct Count {
            Word &sleepers;
            explicit Count(Word &word) : sleepers(word) { ++sleepers; }
            ~Count() { --sleepers; }
        } count(header()->sleepers);
        while (true) {
            std::uint32_t heard = header()->bell;
            if (all_posted()) return;
            sleep(heard, std::clamp<Seconds>(begin + timeout - Clock::now(), Seconds{0}, kLook));
            if (all_posted()) return;
            check_python_signals();
            check_peers(Clock::now() - begin < timeout ? Seconds{0} : timeout);
        }
    }

    void sleep(std::uint32_t heard, Seconds most) const {
        timespec limit{0, long(most.count() * 1e9)};
        syscall(SYS_futex, &header()->bell, FUTEX_WAIT, heard, &limit, nullptr, 0);
    }

    void ring() const {
        ++header()->bell;
        syscall(SYS_futex, &header()->bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }

    static void relax() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    static void check_python_signals() {
        nb::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }

    // Raise for peers that are missing and gone, and after `waited` seconds (if not 0) for all that are missing.
    void check_peers(Seconds waited) const {
        std::string gone, missing;
        for (std::size_t r = 0; r < ranks_.size(); ++r) {
            bool lives = is_alive(r);
            if (has_posted(r)) continue;  // looked up last: a rank may post and end
            std::string name = "rank " + std::to_string(ranks_[r]) + " (pid " + std::to_string(slot(r).pid) + ")";
            (lives ? missing : gone) += ((lives ? missing : gone).empty() ? "" : ", ") + name;
        }
        if (!gone.empty()) throw std::runtime_error(gone + " has ended or given up");
        if (missing.empty() || waited.count() == 0) return;
        std::ostringstream text;
        text << missing << " did not call within " << waited.count() << " s";
        throw std::runtime_error(text.str());
    }

    static struct flock lock_of(std::size_t r) {
        struct flock byte {};
        byte.l_type = F_WRLCK;
        byte.l_whence = SEEK_SET;
        byte.l_start = off_t(r);
        byte.l_len = 1;
        return byte;
    }

    bool is_alive(std::size_t r) const {
        struct flock byte = lock_of(r);
        bool asked = fcntl(file_.fd, F_GETLK, &byte) == 0;
        return !asked || byte.l_type != F_UNLCK || slot(r).pid == getpid();  // one's own locks are not shown
    }

    // Every rank reads the same signatures, so all come to the same verdict.
    Verdict compare_signatures() const {
        const Signature &first = slot(0).sent[round_ % 2];
        Verdict verdict = kAgree;
        for (std::size_t r = 1; r < ranks_.size(); ++r) {
            const Signature &other = slot(r).sent[round_ % 2];
            if (other.numel != first.numel || other.itemsize != first.itemsize) return kOtherVector;
            if (other.place != first.place) verdict = kOtherPlace;
        }
        return verdict;
    }

    const std::vector<int> ranks_;
    const std::size_t me_;
    File file_;
    Mapping memory_;
    Seconds awake_{0};  // before a wait goes to sleep: there is a core for each rank, or not
    int wary_ = 0;       // waits that are still to be short
    std::uint32_t round_ = 0;
    std::mutex mutex_;
};

}  // namespace

void bind_shared_memory(nb::module_ &module) {
    nb::class_<SharedMemory>(module, "SharedMemory")
        .def(nb::init<std::vector<int>, std::size_t, std::uint64_t, pid_t, int>())
        .def_prop_ro("fd", &SharedMemory::fd)
        .def("start", &SharedMemory::start)
        .def("all_reduce", &SharedMemory::all_reduce, nb::call_guard<nb::gil_scoped_release>())
        .def("give_up", &SharedMemory::give_up)
        .def("close", &SharedMemory::close, nb::call_guard<nb::gil_scoped_release>());
}

#else
void bind_shared_memory(nanobind::module_ &) {}
#endif
