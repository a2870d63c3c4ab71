// Chooses among the instruction sets that were built, by what the processor and the system support.
#include <atomic>
#include <cstring>

#include "sets.hpp"  // made by CMake: CAPIBARA_SETS(SET) names the sets, best first
#include "table.hpp"

#define CAPIBARA_DECLARE(set) \
    namespace capibara_##set { \
    const capibara::Kernels& table(); \
    }
CAPIBARA_SETS(CAPIBARA_DECLARE)

namespace capibara {
namespace {

bool runs_baseline() { return true; }
#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool runs_avx512bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Usable {
    const Kernels* sets[8] = {};
    Usable() {
        int count = 0;
#define CAPIBARA_ADD(set) \
    if (runs_##set()) sets[count++] = &capibara_##set::table();
        CAPIBARA_SETS(CAPIBARA_ADD)
    }
};

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels* const* usable() {
    static const Usable found;
    return found.sets;
}

const Kernels& kernels() {
    const Kernels* now = chosen.load(std::memory_order_acquire);
    return now ? *now : *usable()[0];
}

bool use(const char* name) {
    for (const Kernels* const* set = usable(); *set; ++set)
        if (std::strcmp((*set)->name, name) == 0) return chosen.store(*set, std::memory_order_release), true;
    return false;
}

}  // namespace capibara
