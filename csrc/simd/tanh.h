// tanh of float32 vectors, to 1.1 units in the last place.

#pragma once

#include "simd/math.h"
#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

#if defined(__AVX512BW__)
// Piecewise polynomials of degree 5: one piece for 0 <= x < 0.125, then four per octave
// up to 10. Row 0 holds where each piece starts, row n + 1 the coefficient of (x -
// start)^n. Our own fits of least relative error. Table lookups use other ports than
// multiplication: beside tile products a soft cap costs a quarter less than as a
// quotient of polynomials.
// clang-format off
alignas(64) constexpr float kTanhPieces[7][32] = {
    {0.0f, 0.125f, 0.15625f, 0.1875f, 0.21875f, 0.25f, 0.3125f, 0.375f, 0.4375f, 0.5f,
    0.625f, 0.75f, 0.875f, 1.0f, 1.25f, 1.5f, 1.75f, 2.0f, 2.5f, 3.0f, 3.5f, 4.0f, 5.0f,
    6.0f, 7.0f, 8.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f},
    {0.0f, 0.124353f, 0.15499073f, 0.1853332f, 0.21532634f, 0.24491866f, 0.30270973f,
    0.3583574f, 0.41157004f, 0.46211717f, 0.5545997f, 0.63514894f, 0.7039056f, 0.7615942f,
    0.84828365f, 0.90514827f, 0.94137555f, 0.9640276f, 0.9866143f, 0.9950548f, 0.9981779f,
    0.9993293f, 0.9999092f, 0.9999877f, 0.99999833f, 0.99999976f, 0.0f, 0.0f, 0.0f, 0.0f,
    0.0f, 0.0f},
    {1.0f, 0.98453635f, 0.9759779f, 0.96565163f, 0.95363456f, 0.94001484f, 0.9083668f,
    0.87157995f, 0.8306101f, 0.7864477f, 0.6924191f, 0.5965858f, 0.5045169f, 0.41997495f,
    0.28041524f, 0.18070678f, 0.11381212f, 0.070650056f, 0.02659162f, 9.865764e-3f,
    3.6407772e-3f, 1.3401147e-3f, 1.8146915e-4f, 2.4561092e-5f, 3.3240171e-6f,
    4.4617883e-7f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f},
    {4.4436015e-7f, -0.122430034f, -0.1512675f, -0.17896728f, -0.20534262f, -0.23022676f,
    -0.27497104f, -0.31233674f, -0.3418539f, -0.36342728f, -0.38401422f, -0.37892148f,
    -0.35513392f, -0.3198791f, -0.23788932f, -0.16357327f, -0.10714114f, -0.06809175f,
    -0.026221847f, -9.810717e-3f, -3.631675e-3f, -1.3297637e-3f, -1.8016226e-4f,
    -2.4385945e-5f, -3.3003453e-6f, -4.2431472e-7f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f},
    {-0.33335948f, -0.3129567f, -0.3018838f, -0.28871852f, -0.27366602f, -0.25698087f,
    -0.21958235f, -0.17862628f, -0.1361971f, -0.09433285f, -0.017877076f, 0.0418293f,
    0.081862845f, 0.10410865f, 0.108626716f, 0.087940305f, 0.062944405f, 0.041963235f,
    0.016895205f, 6.4225965e-3f, 2.3912939e-3f, 8.4516144e-4f, 1.14600894e-4f,
    1.5513591e-5f, 2.0996104e-6f, 2.3647033e-7f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f},
    {5.136886e-4f, 0.07987869f, 0.097390115f, 0.113365434f, 0.12759241f, 0.14059521f,
    0.1590536f, 0.1689891f, 0.17075077f, 0.16679369f, 0.13866548f, 0.09948082f, 0.05994875f,
    0.023769654f, -0.015123432f, -0.02598284f, -0.02372135f, -0.017360495f, -7.54706e-3f,
    -2.9438883e-3f, -1.1062037e-3f, -3.443125e-4f, -4.6735015e-5f, -6.327415e-6f,
    -8.5636873e-7f, -7.371856e-8f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f},
    {0.12984104f, 0.11199014f, 0.10217923f, 0.09101201f, 0.07877864f, 0.05917253f,
    0.0320507f, 6.0043316e-3f, -0.017101416f, -0.043341275f, -0.061518047f, -0.06266438f,
    -0.053074468f, -0.03211046f, -9.554757e-3f, 1.3785654e-3f, 4.5958734e-3f, 3.976147e-3f,
    1.916745e-3f, 7.7151123e-4f, 2.9306437e-4f, 6.870457e-5f, 9.334609e-6f, 1.2639704e-6f,
    1.7107206e-7f, 9.799487e-9f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}};
// clang-format on

static inline F32 lookup(const float* pieces, __m512i piece) {
  return (F32)_mm512_permutex2var_ps(_mm512_load_ps(pieces), piece,
                                     _mm512_load_ps(pieces + 16));
}

RAPTAX_INLINE F32 tanh(F32 x) {
  I32 sign = as_bits(x) & INT32_MIN;
  F32 size = min(broadcast(9.02f), as_float(as_bits(x) ^ sign));  // NaN stays
  // Exponent and two mantissa bits, relative to those of 0.125; saturates at piece 0.
  __m512i from = _mm512_subs_epu16((__m512i)size, _mm512_set1_epi32(0x3de0ffff));
  __m512i piece = _mm512_srli_epi32(from, 21);
  F32 t = size - lookup(kTanhPieces[0], piece);
  F32 y = lookup(kTanhPieces[6], piece);
  for (int n = 5; n > 0; --n) y = y * t + lookup(kTanhPieces[n], piece);
  return as_float(as_bits(y) | sign);
}
#else
RAPTAX_INLINE F32 tanh(F32 x) {
  const F32 y = clamp(x, -9.02f, 9.02f), z = y * y;
  F32 p = broadcast(1.8162370912788717e-11f);
  p = p * z - 1.2743785582358669e-8f;
  p = p * z + 9.255117220163811e-6f;
  p = p * z + 2.919409889727831e-3f;
  p = p * z + 1.291797012090683e-1f;
  p = p * z + 1.0f;
  F32 q = broadcast(2.27913522394374e-4f);
  q = q * z + 2.3757630959153175e-2f;
  q = q * z + 4.625125229358673e-1f;
  q = q * z + 1.0f;
  return clamp(y * p * reciprocal(q), -1.0f, 1.0f);
}
#endif

}  // namespace RAPTAX_ISA
}  // namespace raptax
