// Which instruction set runs, chosen once, changeable for tests.
#include <atomic>

#include "internal.h"

#ifndef SK_BUILD_ID
#define SK_BUILD_ID "unknown"
#endif

namespace sk {
namespace {

struct Choice {
  const Kernels* table;
  bool (*supported)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Choice kChoices[] = {
    {&kPortable, always},
#if defined(__x86_64__)
    {&kAvx2, has_avx2},
    {&kAvx512, has_avx512},
    {&kAvx512Bf16, has_avx512bf16},
#elif defined(__aarch64__)
    {&kNeon, always},  // part of every such processor
#endif
};
constexpr int kCount = int(sizeof kChoices / sizeof kChoices[0]);
std::atomic<const Kernels*> current{nullptr};

const Choice* find(const char* name) {
  for (const Choice& c : kChoices)
    if (strcmp(c.table->name, name) == 0) return &c;
  return nullptr;
}

const Kernels* best() {
  const Kernels* found = &kPortable;
  for (const Choice& c : kChoices)
    if (c.supported()) found = c.table;
  return found;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_relaxed);
  if (!table) current.store(table = best(), std::memory_order_relaxed);
  return *table;
}

}  // namespace sk

extern "C" {
int sk_abi_version(void) { return SK_ABI_VERSION; }
const char* sk_build_id(void) { return SK_BUILD_ID; }
const char* sk_isa_name(int index) {
  return index >= 0 && index < sk::kCount ? sk::kChoices[index].table->name : nullptr;
}
int sk_isa_supported(const char* name) {
  const sk::Choice* choice = name ? sk::find(name) : nullptr;
  return choice && choice->supported();
}
int sk_isa_use(const char* name) {
  if (!name) {
    sk::current.store(sk::best());
    return SK_OK;
  }
  if (!sk_isa_supported(name)) return SK_UNSUPPORTED;
  sk::current.store(sk::find(name)->table);
  return SK_OK;
}
const char* sk_isa_current(void) { return sk::kernels().name; }
}
