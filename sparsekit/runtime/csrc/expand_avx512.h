// Packed values to their places. vpexpandw/b waits for its destination register even when it zeroes what it does not
// write, and its memory form is slow: so values are loaded and expanded in place.
#pragma once
#include <immintrin.h>

#include "internal.h"

namespace sk {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

inline __m512i expand16(const void* p, uint32_t mask) {
  __m512i v = _mm512_loadu_si512(p);
  __mmask32 k = mask;
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(k));
  return v;
}
inline __m512i expand8(__m512i v, uint64_t mask) {
  __mmask64 k = mask;
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(k));
  return v;
}
inline __m512 expand32(const void* p, uint32_t mask) {
  __m512i v = _mm512_loadu_si512(p);
  __mmask16 k = __mmask16(mask);
  asm("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(k));
  return _mm512_castsi512_ps(v);
}
// Pairs of bf16 to floats.
inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
