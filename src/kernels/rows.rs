//! Work on one row at a time: norms, gated activations, softmax.

use super::{
    Kernels,
    simd::{LANES, Simd, exp, load_partial, store_partial},
};

/// Applies `$body` to sixteen lanes at a time of equally long slices, the last ones partial.
macro_rules! lanes {
    ($S:ty, $length:expr, |$at:ident, $count:ident| $body:block) => {
        let length = $length;
        let mut $at = 0;
        while $at < length {
            let $count = LANES.min(length - $at);
            $body
            $at += LANES;
        }
    };
}

#[inline(always)]
pub(super) unsafe fn get<S: Simd>(from: &[f32], at: usize, count: usize) -> S::V {
    debug_assert!(at + count <= from.len());
    // SAFETY: `at + count` is within the slice by the callers' equal lengths.
    unsafe {
        if count == LANES {
            S::load(from.as_ptr().add(at))
        } else {
            load_partial::<S>(from.as_ptr().add(at), count)
        }
    }
}

#[inline(always)]
pub(super) unsafe fn put<S: Simd>(to: &mut [f32], at: usize, count: usize, value: S::V) {
    debug_assert!(at + count <= to.len());
    // SAFETY: `at + count` is within the slice by the callers' equal lengths.
    unsafe {
        if count == LANES {
            S::store(to.as_mut_ptr().add(at), value);
        } else {
            store_partial::<S>(to.as_mut_ptr().add(at), value, count);
        }
    }
}

#[inline(always)]
unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: equal lengths by the callers' contract.
    unsafe {
        let mut sum = S::splat(0.0);
        lanes!(S, a.len(), |at, count| {
            sum = S::fma(get::<S>(a, at, count), get::<S>(b, at, count), sum);
        });
        S::sum(sum)
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`, for one row.
///
/// # Safety
/// All slices are equally long; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: equal lengths by contract.
    unsafe {
        let inverse = S::splat(inverse_rms::<S>(x, eps));
        lanes!(S, x.len(), |at, count| {
            let normed = S::mul(get::<S>(x, at, count), inverse);
            put::<S>(out, at, count, S::mul(normed, get::<S>(weight, at, count)));
        });
    }
}

#[inline(always)]
unsafe fn inverse_rms<S: Simd>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: the caller has the features of `S`.
    let squares = unsafe { dot::<S>(x, x) };
    #[allow(clippy::cast_precision_loss)]
    let mean = squares / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

/// One row's backward pass through the RMS norm.
pub struct RmsNormGradient<'a> {
    /// The row that went in.
    pub x: &'a [f32],
    /// The norm's weight.
    pub weight: &'a [f32],
    /// The gradient of the row that came out.
    pub grad_out: &'a [f32],
    /// The norm's epsilon.
    pub eps: f32,
    /// Receives the gradient of `x`.
    pub grad_x: &'a mut [f32],
    /// The gradient of `weight` is added here, where one is wanted.
    pub grad_weight: Option<&'a mut [f32]>,
}

/// With `n = x * inv`: `dx = inv * (w dy - n * mean(w dy n))`, `dw += dy n`.
///
/// # Safety
/// All slices are equally long; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn rms_norm_backward<S: Simd>(job: RmsNormGradient<'_>) {
    let RmsNormGradient { x, weight, grad_out, eps, grad_x, grad_weight } = job;
    // SAFETY: equal lengths by contract.
    unsafe {
        let inverse = inverse_rms::<S>(x, eps);
        let mut sum = S::splat(0.0);
        lanes!(S, x.len(), |at, count| {
            let weighted = S::mul(get::<S>(weight, at, count), get::<S>(grad_out, at, count));
            sum = S::fma(weighted, get::<S>(x, at, count), sum);
        });
        #[allow(clippy::cast_precision_loss)]
        let pull = -S::sum(sum) * inverse * inverse / x.len() as f32;
        lanes!(S, x.len(), |at, count| {
            let weighted = S::mul(get::<S>(weight, at, count), get::<S>(grad_out, at, count));
            let moved = S::fma(get::<S>(x, at, count), S::splat(pull), weighted);
            put::<S>(grad_x, at, count, S::mul(moved, S::splat(inverse)));
        });
        if let Some(grad_weight) = grad_weight {
            lanes!(S, x.len(), |at, count| {
                let normed = S::mul(get::<S>(x, at, count), S::splat(inverse));
                let grad =
                    S::fma(normed, get::<S>(grad_out, at, count), get::<S>(grad_weight, at, count));
                put::<S>(grad_weight, at, count, grad);
            });
        }
    }
}

#[inline(always)]
unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: lane arithmetic on the caller's features.
    unsafe {
        let e = exp::<S>(S::mul(x, S::splat(-1.0)));
        S::div(S::splat(1.0), S::add(S::splat(1.0), e))
    }
}

/// `out = gate * sigmoid(gate) * up`.
///
/// # Safety
/// All slices are equally long; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn silu_mul<S: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: equal lengths by contract.
    unsafe {
        lanes!(S, gate.len(), |at, count| {
            let g = get::<S>(gate, at, count);
            let silu = S::mul(g, sigmoid::<S>(g));
            put::<S>(out, at, count, S::mul(silu, get::<S>(up, at, count)));
        });
    }
}

/// The backward pass of [`silu_mul`].
pub(super) struct SiluMulGradient<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) grad_out: &'a [f32],
    pub(super) grad_gate: &'a mut [f32],
    pub(super) grad_up: &'a mut [f32],
}

/// With `s = sigmoid(g)`: `dup = dy g s`, `dgate = dy up s (1 + g (1 - s))`.
///
/// # Safety
/// All slices are equally long; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn silu_mul_backward<S: Simd>(job: SiluMulGradient<'_>) {
    let SiluMulGradient { gate, up, grad_out, grad_gate, grad_up } = job;
    // SAFETY: equal lengths by contract.
    unsafe {
        let one = S::splat(1.0);
        lanes!(S, gate.len(), |at, count| {
            let g = get::<S>(gate, at, count);
            let dy = get::<S>(grad_out, at, count);
            let s = sigmoid::<S>(g);
            put::<S>(grad_up, at, count, S::mul(dy, S::mul(g, s)));
            let rest = S::fma(s, S::splat(-1.0), one);
            let slope = S::mul(s, S::fma(g, rest, one));
            put::<S>(grad_gate, at, count, S::mul(S::mul(dy, get::<S>(up, at, count)), slope));
        });
    }
}

/// The greatest element and the sum of `e^(x - max)`.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn softmax_stats<S: Simd>(x: &[f32]) -> (f32, f32) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // SAFETY: one slice; partial lanes are taken out again below.
    unsafe {
        let mut sum = S::splat(0.0);
        let mut tail = 0.0;
        let shift = S::splat(-max);
        lanes!(S, x.len(), |at, count| {
            let e = exp::<S>(S::add(get::<S>(x, at, count), shift));
            if count == LANES {
                sum = S::add(sum, e);
            } else {
                let mut lanes = [0.0; LANES];
                S::store(lanes.as_mut_ptr(), e);
                tail = lanes[..count].iter().sum();
            }
        });
        (max, S::sum(sum) + tail)
    }
}

/// `x = e^(x - max) * scale` in place.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn softmax_scaled<S: Simd>(x: &mut [f32], max: f32, scale: f32) {
    // SAFETY: one slice.
    unsafe {
        lanes!(S, x.len(), |at, count| {
            let e = exp::<S>(S::add(get::<S>(x, at, count), S::splat(-max)));
            put::<S>(x, at, count, S::mul(e, S::splat(scale)));
        });
    }
}

impl Kernels {
    /// RMS norm of one row. Panics where the lengths differ.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len(), "rms_norm: lengths differ");
        // SAFETY: the lengths are equal; this table fits this CPU.
        unsafe { (self.rms_norm)(x, weight, eps, out) }
    }

    /// Backward pass of [`Kernels::rms_norm`]. Panics where the lengths differ.
    pub fn rms_norm_backward(&self, job: RmsNormGradient<'_>) {
        let n = job.x.len();
        let lengths = [job.weight.len(), job.grad_out.len(), job.grad_x.len()];
        assert!(lengths.iter().all(|length| *length == n), "rms_norm_backward: lengths differ");
        assert!(job.grad_weight.as_ref().is_none_or(|grad| grad.len() == n));
        // SAFETY: the lengths are equal; this table fits this CPU.
        unsafe { (self.rms_norm_backward)(job) }
    }

    /// `silu(gate) * up`. Panics where the lengths differ.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len(), "silu_mul: lengths differ");
        // SAFETY: the lengths are equal; this table fits this CPU.
        unsafe { (self.silu_mul)(gate, up, out) }
    }

    /// Backward pass of [`Kernels::silu_mul`]: the gradients of `gate` and `up`. Panics where the
    /// lengths differ.
    pub fn silu_mul_backward(
        &self,
        (gate, up): (&[f32], &[f32]),
        grad_out: &[f32],
        (grad_gate, grad_up): (&mut [f32], &mut [f32]),
    ) {
        let n = gate.len();
        let lengths = [up.len(), grad_out.len(), grad_gate.len(), grad_up.len()];
        assert!(lengths.iter().all(|length| *length == n), "silu_mul_backward: lengths differ");
        let job = SiluMulGradient { gate, up, grad_out, grad_gate, grad_up };
        // SAFETY: the lengths are equal; this table fits this CPU.
        unsafe { (self.silu_mul_backward)(job) }
    }

    /// Greatest logit and the sum of `e^(logit - greatest)`; their log-sum-exp is `max + ln(sum)`.
    #[must_use]
    pub fn softmax_stats(&self, logits: &[f32]) -> (f32, f32) {
        // SAFETY: this table fits this CPU.
        unsafe { (self.softmax_stats)(logits) }
    }

    /// Replaces logits by `e^(logit - max) * scale`.
    pub fn softmax_scaled(&self, logits: &mut [f32], max: f32, scale: f32) {
        // SAFETY: this table fits this CPU.
        unsafe { (self.softmax_scaled)(logits, max, scale) }
    }
}
