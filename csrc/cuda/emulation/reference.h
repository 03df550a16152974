// SPDX-License-Identifier: BSD-3-Clause
// The row equation of csrc/softce.h in double precision, element by element, and nothing of the kernels' arithmetic.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "softce.h"

namespace reference {

using softce::Phi;
using softce::Spec;

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Row {
  std::vector<double> logits;
  bool sparse = true;
  std::vector<int64_t> index;
  std::vector<double> value;  // empty: 1 each
  double rest = 0.0;
  std::vector<double> dense;
  std::vector<double> weight;  // empty: 1 each
  int64_t ignore_index = -100;
  double row_weight = 1.0;
};

struct Result {
  bool ignored = false, bad_index = false;
  double loss = 0, lse = 0, mass = 0, count = 0;
  std::vector<double> gradient;  // of phi(l), before row weight and reduction
  double transformed = 0;        // phi(l), 0 where ignored
  double largest_term = 0;       // of what the gradient subtracts: its rounding is relative to this
  double uncapped_term = 0;      // the same before the soft cap's slope, itself a difference that rounds
};

inline double phi(const Spec& s, double l) {
  const double a = s.phi_p0;
  switch (static_cast<Phi>(static_cast<int>(s.phi))) {
    case Phi::focal:
      return l == kInf || a == 0 ? l : (l == 0 ? 0 : std::pow(-std::expm1(-l), a) * l);
    case Phi::label_relaxation:
      if (a == 0) return l;
      return l < -std::log1p(-a) ? 0 : (1 - a) * (std::log1p(-a) + l) + a * (std::log(a) - std::log(-std::expm1(-l)));
    case Phi::generalized:
      return -std::expm1(-a * l) / a;
    case Phi::poly1:
      return l - a * std::expm1(-l);
    default:
      return l;
  }
}

// By differences, so that it knows nothing of the closed forms; at the ends where those are needed, their limits.
inline double phi_slope(const Spec& s, double l) {
  if (l == kInf) {
    const Phi kind = static_cast<Phi>(static_cast<int>(s.phi));
    return kind == Phi::generalized ? 0 : (kind == Phi::label_relaxation ? 1 - s.phi_p0 : 1);
  }
  if (static_cast<Phi>(static_cast<int>(s.phi)) == Phi::generalized)
    return std::exp(-s.phi_p0 * l);  // differences of
                                     // numbers near 1 / q have no digits left
  if (l < 1e-12) return (phi(s, 1e-12) - phi(s, 0)) / 1e-12;
  const double h = 1e-5 * (l < 1 ? l : 1);
  return (phi(s, l + h) - phi(s, l - h)) / (2 * h);
}

inline double product(double q, double y) { return q == 0 && y == -kInf ? 0 : q * y; }

inline Result run(const Row& row, const Spec& s) {
  const size_t C = row.logits.size();
  Result r;
  r.gradient.assign(C, 0.0);
  std::vector<double> y(C), slope(C), t(C, 0.0), q(C);
  if (row.sparse) {
    r.ignored = true;
    for (size_t k = 0; k < row.index.size(); ++k) {
      const int64_t c = row.index[k];
      if (c == row.ignore_index) continue;
      r.ignored = false;
      if (c < 0 || c >= static_cast<int64_t>(C)) {
        r.bad_index = true;
      } else {
        t[static_cast<size_t>(c)] += row.value.empty() ? 1.0 : row.value[k];
      }
    }
    if (r.ignored) return r;
    for (double& x : t) x += row.rest;
  } else if (s.dense_kind == 1) {
    double top = -kInf, sum = 0;
    for (double z : row.dense) top = z > top ? z : top;
    for (double z : row.dense) sum += std::exp((z - top) / s.dense_temperature);
    for (size_t c = 0; c < C; ++c) t[c] = std::exp((row.dense[c] - top) / s.dense_temperature) / sum;
  } else {
    t = row.dense;
  }
  double top = -kInf;
  for (size_t c = 0; c < C; ++c) {
    const double x = row.logits[c], th = s.softcap > 0 ? std::tanh(x / s.softcap) : 0;
    y[c] = (s.softcap > 0 ? s.softcap * th : x) / s.temperature;
    slope[c] = (s.softcap > 0 ? 1 - th * th : 1) / s.temperature;
    if (y[c] > top) top = y[c];
  }
  const double shift = top == -kInf ? 0 : top;
  double sum = 0, dot = 0;
  for (size_t c = 0; c < C; ++c) {
    const double w = row.weight.empty() ? 1.0 : row.weight[c];
    q[c] = w * (s.mix_a * t[c] + s.mix_b);
    r.mass += q[c];
    dot += product(q[c], y[c] - shift);
    sum += std::exp(y[c] - shift);
  }
  const double log_sum = std::log(sum);
  r.lse = shift + log_sum;
  r.loss = r.mass * log_sum - dot + (s.z_loss != 0 ? s.z_loss * r.lse * r.lse : 0);
  r.count = row.sparse && row.index.size() == 1 && row.value.empty() && !row.weight.empty() && !r.bad_index
                ? row.weight[static_cast<size_t>(row.index[0])]
                : 1.0;
  r.transformed = phi(s, r.loss);
  const double p0 = phi_slope(s, r.loss), toward = r.mass + (s.z_loss != 0 ? 2 * s.z_loss * r.lse : 0);
  for (size_t c = 0; c < C; ++c) {
    const double p = std::exp(y[c] - r.lse);
    r.gradient[c] = p0 * (toward * p - q[c]) * slope[c];
    const double term = std::fabs(p0) * (std::fabs(toward * p) + std::fabs(q[c])) / s.temperature;
    if (term > r.uncapped_term) r.uncapped_term = term;
    if (term * slope[c] * s.temperature > r.largest_term) r.largest_term = term * slope[c] * s.temperature;
  }
  return r;
}

}  // namespace reference
