//! The function table of one instruction set, and which of them this CPU has.

use std::sync::OnceLock;

use half::{bf16, f16};

use super::{attention, gemm, portable, rows};

/// The functions of one instruction set. They are called only by the safe wrappers of this floor,
/// which check lengths; [`best`] and [`all`] only hand out tables that this CPU can run.
pub struct Kernels {
    /// Name of the instruction set, for logs and benches.
    pub name: &'static str,
    pub(super) linear_f32: unsafe fn(&gemm::LinearTile<f32>),
    pub(super) linear_bf16: unsafe fn(&gemm::LinearTile<bf16>),
    pub(super) linear_f16: unsafe fn(&gemm::LinearTile<f16>),
    pub(super) matmul_f32: unsafe fn(&gemm::MatmulTile<f32>),
    pub(super) matmul_bf16: unsafe fn(&gemm::MatmulTile<bf16>),
    pub(super) matmul_f16: unsafe fn(&gemm::MatmulTile<f16>),
    pub(super) attention: unsafe fn(&attention::ForwardTile),
    pub(super) attention_backward: unsafe fn(&attention::BackwardTile),
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) rms_norm_backward: unsafe fn(rows::RmsNormGradient<'_>),
    pub(super) silu_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    pub(super) silu_mul_backward: unsafe fn(rows::SiluMulGradient<'_>),
    pub(super) softmax_stats: unsafe fn(&[f32]) -> (f32, f32),
    pub(super) softmax_scaled: unsafe fn(&mut [f32], f32, f32),
}

/// Instantiates the generic bodies for one instruction set as `KERNELS`.
macro_rules! kernels_for {
    ($simd:ty, $name:literal, #[$attribute:meta]) => {
        kernels_for!(@ $simd, #[$attribute],
            linear_f32(tile: &super::gemm::LinearTile<f32>) = gemm::linear_tile;
            linear_bf16(tile: &super::gemm::LinearTile<half::bf16>) = gemm::linear_tile;
            linear_f16(tile: &super::gemm::LinearTile<half::f16>) = gemm::linear_tile;
            matmul_f32(tile: &super::gemm::MatmulTile<f32>) = gemm::matmul_tile;
            matmul_bf16(tile: &super::gemm::MatmulTile<half::bf16>) = gemm::matmul_tile;
            matmul_f16(tile: &super::gemm::MatmulTile<half::f16>) = gemm::matmul_tile;
        );
        kernels_for!(! $simd, #[$attribute],
            attention(tile: &super::attention::ForwardTile) -> () = attention::forward_tile;
            attention_backward(tile: &super::attention::BackwardTile) -> ()
                = attention::backward_tile;
            rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> ()
                = rows::rms_norm;
            rms_norm_backward(job: super::rows::RmsNormGradient<'_>) -> ()
                = rows::rms_norm_backward;
            silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) -> () = rows::silu_mul;
            silu_mul_backward(job: super::rows::SiluMulGradient<'_>) -> ()
                = rows::silu_mul_backward;
            softmax_stats(x: &[f32]) -> (f32, f32) = rows::softmax_stats;
            softmax_scaled(x: &mut [f32], max: f32, scale: f32) -> () = rows::softmax_scaled;
        );
        pub(super) const KERNELS: super::Kernels = super::Kernels {
            name: $name,
            linear_f32,
            linear_bf16,
            linear_f16,
            matmul_f32,
            matmul_bf16,
            matmul_f16,
            attention,
            attention_backward,
            rms_norm,
            rms_norm_backward,
            silu_mul,
            silu_mul_backward,
            softmax_stats,
            softmax_scaled,
        };
    };
    (@ $simd:ty, #[$attribute:meta],
     $($fn_name:ident($arg:ident: &super::gemm::$tile:ident<$weight:ty>) = $module:ident::$body:ident;)*) => {$(
        #[$attribute]
        unsafe fn $fn_name($arg: &super::gemm::$tile<$weight>) {
            // SAFETY: the caller keeps the body's contract, and `best`/`all` hand this function
            // out only on a CPU with its features.
            unsafe { super::$module::$body::<$simd, $weight>($arg) }
        }
    )*};
    (! $simd:ty, #[$attribute:meta],
     $($fn_name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $module:ident::$body:ident;)*) => {$(
        #[$attribute]
        unsafe fn $fn_name($($arg: $ty),*) -> $ret {
            // SAFETY: the caller keeps the body's contract, and `best`/`all` hand this function
            // out only on a CPU with its features.
            unsafe { super::$module::$body::<$simd>($($arg),*) }
        }
    )*};
}

/// The fastest table that this CPU can run, chosen once. `TUNESMITH_KERNELS` (a table's name)
/// overrides the choice, for comparisons.
pub fn best() -> &'static Kernels {
    static BEST: OnceLock<&'static Kernels> = OnceLock::new();
    BEST.get_or_init(|| {
        let wanted = std::env::var("TUNESMITH_KERNELS").ok();
        let available = all();
        let named = available.iter().find(|table| Some(table.name) == wanted.as_deref());
        named.or(available.last()).copied().expect("the portable table is always there")
    })
}

/// Every table that this CPU can run, slowest first.
#[must_use]
pub fn all() -> Vec<&'static Kernels> {
    let mut tables = vec![&portable::KERNELS];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            tables.push(&super::avx2::KERNELS);
            if is_x86_feature_detected!("avx512f") {
                tables.push(&super::avx512::KERNELS);
            }
        }
    }
    tables
}
