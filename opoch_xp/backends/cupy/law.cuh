// The law of few keys: what a node of n keys holds of a query's softmax, estimated from its count, mean and variance.
//
// What: opoch_xp/treecode/law.py, in T; there is where it comes from. Cost: the coefficients of a count take a logarithm and
// some divisions, so that none is worth a table in memory; a node and query take three roots, a division and a logarithm.
//
// Letters: dot, the logit of the mean key; sigma2, the variance of the logits; the fields of Law are those of law.py.

#pragma once
#include "numbers.cuh"

template <class T> struct Law {
  T log, gain, width, slope, knee, share;  // log: ln n, -inf for no key
};

template <class T> __device__ __forceinline__ Law<T> law_of(T count) {
  const T n = larger(count, (T)1), log = logarithm(n), t = 1 + (T)0.26 * log;
  const T s = 1 / (1 + (T)0.25 * log), p = (T)1.2 + (T)0.4 * log;
  return {count > 0 ? log : -infinity<T>(), log * ((T)0.92 + (T)0.067 * log), 1 / (t * t), s * s, p * p, p * p / n};
}

// ln of the sum of exp(logit) over the keys of a node.
template <class T> __device__ __forceinline__ T log_mass(const Law<T>& law, T dot, T sigma2) {
  if (law.log == -infinity<T>()) return law.log;
  return dot + law.log + law.gain * (root(1 + sigma2 * law.width) - 1);
}

// By how much the log of what a node may hold exceeds that: three deviations, less where its keys are alike.
template <class T> __device__ __forceinline__ T excess(const Law<T>& law, T sigma2) {
  const T deviation = root(sigma2 * (law.slope * sigma2 + law.share) / (sigma2 + law.knee));
  return 3 * deviation + logarithm(larger(smaller(sigma2, (T)1), (T)1e-30)) / 2;
}
