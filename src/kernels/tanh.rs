//! The hyperbolic tangent and what is made of it: GELU's gate and soft caps.

use super::{
    Kernels,
    rows::{get, put},
    simd::{LANES, Simd},
};

/// `sqrt(2 / pi)`, of GELU's approximation by a hyperbolic tangent.
const GELU_FACTOR: f32 = 0.797_884_6;
/// The factor on the cube in it.
const GELU_CUBE: f32 = 0.044_715;

/// `tanh(x)` to a few ulp: the rational approximation of degree 13 by 6 that Eigen uses, beyond whose
/// range it is 1 in f32.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: lane arithmetic on the caller's features.
    unsafe {
        let x = S::min(S::max(x, S::splat(-7.905_311)), S::splat(7.905_311));
        let square = S::mul(x, x);
        let mut p = S::splat(-2.760_768_5e-16);
        for c in [
            2.000_187_9e-13,
            -8.604_672e-11,
            5.122_297e-8,
            1.485_722_4e-5,
            6.372_619_3e-4,
            4.893_524_6e-3,
        ] {
            p = S::fma(p, square, S::splat(c));
        }
        let mut q = S::splat(1.198_258_4e-6);
        for c in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525_2e-3] {
            q = S::fma(q, square, S::splat(c));
        }
        S::div(S::mul(x, p), q)
    }
}

/// `tanh(sqrt(2 / pi) (g + 0.044715 g^3))`.
#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(g: S::V) -> S::V {
    // SAFETY: lane arithmetic on the caller's features.
    unsafe {
        let cubic = S::fma(S::mul(g, g), S::splat(GELU_CUBE), S::splat(1.0));
        tanh::<S>(S::mul(S::mul(g, S::splat(GELU_FACTOR)), cubic))
    }
}

/// `out = gelu(gate) * up` with `gelu(g) = g (1 + t) / 2`, `t = tanh(sqrt(2 / pi) (g + 0.044715 g^3))`
/// (Hendrycks & Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
///
/// # Safety
/// All slices are equally long; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn gelu_mul<S: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: equal lengths by contract.
    unsafe {
        for at in (0..gate.len()).step_by(LANES) {
            let count = LANES.min(gate.len() - at);
            let g = get::<S>(gate, at, count);
            let half = S::mul(g, S::splat(0.5));
            let gelu = S::fma(half, gelu_tanh::<S>(g), half);
            put::<S>(out, at, count, S::mul(gelu, get::<S>(up, at, count)));
        }
    }
}

/// The backward pass of [`gelu_mul`].
pub(super) struct GeluMulGradient<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) grad_out: &'a [f32],
    pub(super) grad_gate: &'a mut [f32],
    pub(super) grad_up: &'a mut [f32],
}

/// `dup = dy gelu(g)`, `dgate = dy up gelu'(g)` with
/// `gelu'(g) = (1 + t) / 2 + g (1 - t^2) sqrt(2 / pi) (1 + 3 * 0.044715 g^2) / 2`.
///
/// # Safety
/// All slices are equally long; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn gelu_mul_backward<S: Simd>(job: GeluMulGradient<'_>) {
    let GeluMulGradient { gate, up, grad_out, grad_gate, grad_up } = job;
    // SAFETY: equal lengths by contract.
    unsafe {
        let one = S::splat(1.0);
        for at in (0..gate.len()).step_by(LANES) {
            let count = LANES.min(gate.len() - at);
            let (g, dy) = (get::<S>(gate, at, count), get::<S>(grad_out, at, count));
            let half = S::mul(g, S::splat(0.5));
            let t = gelu_tanh::<S>(g);
            put::<S>(grad_up, at, count, S::mul(dy, S::fma(half, t, half)));
            let inner = S::fma(S::mul(g, g), S::splat(3.0 * GELU_CUBE), one);
            let bend = S::mul(S::sub(one, S::mul(t, t)), S::mul(inner, S::splat(GELU_FACTOR)));
            let slope = S::fma(half, bend, S::mul(S::add(one, t), S::splat(0.5)));
            put::<S>(grad_gate, at, count, S::mul(S::mul(dy, get::<S>(up, at, count)), slope));
        }
    }
}

/// `x = cap * tanh(x / cap)` in place.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn soft_cap<S: Simd>(x: &mut [f32], cap: f32) {
    // SAFETY: one slice.
    unsafe {
        for at in (0..x.len()).step_by(LANES) {
            let count = LANES.min(x.len() - at);
            let bent = tanh::<S>(S::mul(get::<S>(x, at, count), S::splat(1.0 / cap)));
            put::<S>(x, at, count, S::mul(bent, S::splat(cap)));
        }
    }
}

impl Kernels {
    /// `gelu(gate) * up`. Panics where the lengths differ.
    pub fn gelu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len(), "gelu_mul: lengths differ");
        // SAFETY: the lengths are equal; this table fits this CPU.
        unsafe { (self.gelu_mul)(gate, up, out) }
    }

    /// Backward pass of [`Kernels::gelu_mul`]: the gradients of `gate` and `up`. Panics where the
    /// lengths differ.
    pub fn gelu_mul_backward(
        &self,
        (gate, up): (&[f32], &[f32]),
        grad_out: &[f32],
        (grad_gate, grad_up): (&mut [f32], &mut [f32]),
    ) {
        let n = gate.len();
        let lengths = [up.len(), grad_out.len(), grad_gate.len(), grad_up.len()];
        assert!(lengths.iter().all(|length| *length == n), "gelu_mul_backward: lengths differ");
        let job = GeluMulGradient { gate, up, grad_out, grad_gate, grad_up };
        // SAFETY: the lengths are equal; this table fits this CPU.
        unsafe { (self.gelu_mul_backward)(job) }
    }

    /// Replaces `x` by `cap * tanh(x / cap)`.
    pub fn soft_cap(&self, x: &mut [f32], cap: f32) {
        // SAFETY: this table fits this CPU.
        unsafe { (self.soft_cap)(x, cap) }
    }
}
