//! The function table of one instruction set, and which of them this CPU has.

use std::sync::OnceLock;

use super::{
    attention, gemm, lora, portable, product, quant_product, quant_rows, quantize, row_tiles, rows,
    tanh, turned,
};

/// The functions of one instruction set. They are called only by the safe wrappers of this floor,
/// which check lengths; [`best`] and [`all`] only hand out tables that this CPU can run.
pub struct Kernels {
    /// Name of the instruction set, for logs and benches.
    pub name: &'static str,
    /// Up to so many rows are multiplied as they are; more are tiled first.
    pub(super) few_rows: usize,
    /// Rows of a tile.
    pub(super) row_tile: usize,
    /// Rows of a tile of integers.
    pub(super) quant_tile: usize,
    pub(super) tile_rows: unsafe fn(row_tiles::TileRows<'_>),
    pub(super) panels_f32: unsafe fn(&product::PanelTile),
    pub(super) panels_f16: unsafe fn(&product::PanelTile),
    pub(super) panels_bf16: unsafe fn(&product::PanelTile),
    pub(super) panels_bf16_dot: unsafe fn(&product::PanelTile),
    pub(super) panels_int8: unsafe fn(&quant_product::QuantTile),
    pub(super) panels_int4: unsafe fn(&quant_product::QuantTile),
    pub(super) pair_row: unsafe fn(&[f32], &mut [f32]),
    pub(super) quantize: unsafe fn(&quant_rows::QuantizeRows<'_>),
    pub(super) round_int8: unsafe fn(quantize::RoundRow<'_>),
    pub(super) round_int4: unsafe fn(quantize::RoundRow<'_>),
    pub(super) turn: unsafe fn(turned::TurnTile<'_>),
    pub(super) shrink: unsafe fn(&[lora::ShrinkSum], usize),
    pub(super) expand: unsafe fn(&lora::ExpandTile),
    pub(super) matmul: unsafe fn(&gemm::MatmulTile),
    pub(super) attention: unsafe fn(&attention::ForwardTile),
    pub(super) attention_bf16: unsafe fn(&attention::ForwardTile),
    pub(super) attention_int8: unsafe fn(&attention::ForwardTile),
    pub(super) attention_backward: unsafe fn(&attention::BackwardTile),
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) rms_norm_backward: unsafe fn(rows::RmsNormGradient<'_>),
    pub(super) silu_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    pub(super) silu_mul_backward: unsafe fn(rows::SiluMulGradient<'_>),
    pub(super) gelu_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    pub(super) gelu_mul_backward: unsafe fn(tanh::GeluMulGradient<'_>),
    pub(super) soft_cap: unsafe fn(&mut [f32], f32),
    pub(super) softmax_stats: unsafe fn(&[f32]) -> (f32, f32),
    pub(super) softmax_scaled: unsafe fn(&mut [f32], f32, f32),
}

/// Instantiates the generic bodies for one instruction set as `KERNELS`. The numbers are the sizes of
/// its register tiles: rows that are few, rows of a group of these, rows of a tile, panels under one or two rows, panels
/// under more;
/// rows of a tile of integers and its panels.
macro_rules! kernels_for {
    ($simd:ty, $name:literal, ($few:literal, $group:literal, $many:literal, $wide:literal, $nv:literal),
     ($quant_many:literal, $quant_nv:literal), #[$attribute:meta]) => {
        type F16 = half::f16;
        type Bf16 = half::bf16;
        use super::simd::Bf16Pair;
        kernels_for!(#[$attribute],
            tile_rows(job: super::row_tiles::TileRows<'_>) -> () = row_tiles::tile_rows::<$simd>;
            panels_f32(tile: &super::product::PanelTile) -> ()
                = product::panel_tile::<$simd, f32, $group, $many, $wide, $nv>;
            panels_f16(tile: &super::product::PanelTile) -> ()
                = product::panel_tile::<$simd, F16, $group, $many, $wide, $nv>;
            panels_bf16(tile: &super::product::PanelTile) -> ()
                = product::panel_tile::<$simd, Bf16, $group, $many, $wide, $nv>;
            panels_bf16_dot(tile: &super::product::PanelTile) -> ()
                = product::panel_tile::<$simd, Bf16Pair, $group, $many, $wide, $nv>;
            pair_row(x: &[f32], to: &mut [f32]) -> () = bf16_rows::pair_row::<$simd>;
            panels_int8(tile: &super::quant_product::QuantTile) -> ()
                = quant_product::quant_tile::<$simd, 8, $quant_many, $wide, $quant_nv>;
            panels_int4(tile: &super::quant_product::QuantTile) -> ()
                = quant_product::quant_tile::<$simd, 4, $quant_many, $wide, $quant_nv>;
            quantize(job: &super::quant_rows::QuantizeRows<'_>) -> ()
                = quant_rows::quantize_rows::<$simd>;
            round_int8(row: super::quantize::RoundRow<'_>) -> ()
                = quantize::round_to_8_bits::<$simd>;
            round_int4(row: super::quantize::RoundRow<'_>) -> ()
                = quantize::round_to_4_bits::<$simd>;
            turn(tile: super::turned::TurnTile<'_>) -> () = turned::turn_tile::<$simd>;
            shrink(sums: &[super::lora::ShrinkSum], terms: usize) -> ()
                = lora::shrink_sums::<$simd>;
            expand(tile: &super::lora::ExpandTile) -> () = lora::expand_tile::<$simd>;
            matmul(tile: &super::gemm::MatmulTile) -> () = gemm::matmul_tile::<$simd>;
            attention(tile: &super::attention::ForwardTile) -> ()
                = attention::forward_tile::<$simd, f32>;
            attention_bf16(tile: &super::attention::ForwardTile) -> ()
                = attention::forward_tile::<$simd, Bf16>;
            attention_int8(tile: &super::attention::ForwardTile) -> ()
                = attention::forward_tile::<$simd, i8>;
            attention_backward(tile: &super::attention::BackwardTile) -> ()
                = attention::backward_tile::<$simd>;
            rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> ()
                = rows::rms_norm::<$simd>;
            rms_norm_backward(job: super::rows::RmsNormGradient<'_>) -> ()
                = rows::rms_norm_backward::<$simd>;
            silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) -> ()
                = rows::silu_mul::<$simd>;
            silu_mul_backward(job: super::rows::SiluMulGradient<'_>) -> ()
                = rows::silu_mul_backward::<$simd>;
            gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) -> () = tanh::gelu_mul::<$simd>;
            gelu_mul_backward(job: super::tanh::GeluMulGradient<'_>) -> ()
                = tanh::gelu_mul_backward::<$simd>;
            soft_cap(x: &mut [f32], cap: f32) -> () = tanh::soft_cap::<$simd>;
            softmax_stats(x: &[f32]) -> (f32, f32) = rows::softmax_stats::<$simd>;
            softmax_scaled(x: &mut [f32], max: f32, scale: f32) -> ()
                = rows::softmax_scaled::<$simd>;
        );
        pub(super) const KERNELS: super::Kernels = super::Kernels {
            name: $name,
            few_rows: $few,
            row_tile: $many,
            quant_tile: $quant_many,
            tile_rows,
            panels_f32,
            panels_f16,
            panels_bf16,
            panels_bf16_dot,
            pair_row,
            panels_int8,
            panels_int4,
            quantize,
            round_int8,
            round_int4,
            turn,
            shrink,
            expand,
            matmul,
            attention,
            attention_bf16,
            attention_int8,
            attention_backward,
            rms_norm,
            rms_norm_backward,
            silu_mul,
            silu_mul_backward,
            gelu_mul,
            gelu_mul_backward,
            soft_cap,
            softmax_stats,
            softmax_scaled,
        };
    };
    (#[$attribute:meta],
     $($fn_name:ident($($arg:ident: $ty:ty),*) -> $ret:ty
        = $module:ident::$body:ident::<$($generic:tt),*>;)*) => {$(
        #[$attribute]
        unsafe fn $fn_name($($arg: $ty),*) -> $ret {
            // SAFETY: the caller keeps the body's contract, and `best`/`all` hand this function
            // out only on a CPU with its features.
            unsafe { super::$module::$body::<$($generic),*>($($arg),*) }
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
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                tables.push(&super::avx512::KERNELS);
                if is_x86_feature_detected!("avx512bf16") {
                    tables.push(&super::avx512::KERNELS_BF16);
                }
            }
        }
    }
    tables
}
