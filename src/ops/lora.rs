//! LoRA's contribution to a projection: `scale * (x A^T) B^T`
//! (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>).

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, CustomOp3, DType, InplaceOp2, Layout, Result, Shape, Tensor};

use super::{
    lora_dtype::LoraDtype,
    profile::{Op, time},
    storage::{f32_slice, mismatch, tensor, with_f32},
    weight::Weight,
};
use crate::kernels::{LoraSegment, MatmulJob, PackedWeight, add_lora, best, linear};

const NAME: &str = "lora";

/// `x [rows, in]`, `a [rank, in]`, `b [out, rank]` -> `[rows, out]`, with gradients of all three.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn lora(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op3(a, b, Lora { scale: narrow(scale) })
}

/// A and B of one projection, packed for serving. Cloning shares them.
#[derive(Clone)]
pub struct LoraPart {
    a: Arc<PackedWeight>,
    b: Arc<PackedWeight>,
    scale: f32,
    factors: Option<Arc<[f32]>>,
}

impl std::fmt::Debug for LoraPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoraPart").field("rank", &self.a.shape()[0]).finish_non_exhaustive()
    }
}

impl LoraPart {
    /// Packs `a [rank, in]` and `b [out, rank]`, f32, as `dtype` has it.
    ///
    /// # Errors
    /// Other shapes or dtypes.
    pub fn new(a: &Tensor, b: &Tensor, scale: f64, dtype: LoraDtype) -> Result<Self> {
        if a.dims2()?.0 != b.dims2()?.1 {
            return Err(mismatch(NAME, "A and B do not fit each other"));
        }
        let pack = |tensor: &Tensor| {
            let columns = tensor.dims2()?.1;
            with_f32(tensor, NAME, |values| Ok(Arc::new(dtype.pack(values, columns))))
        };
        Ok(Self { a: pack(a)?, b: pack(b)?, scale: narrow(scale), factors: None })
    }

    /// The same A and B as DoRA has them over a base: `factors [out]` are those of
    /// [`dora::factors`](super::dora::factors).
    ///
    /// # Errors
    /// Where the factors do not fit B.
    pub fn with_factors(&self, factors: Vec<f32>) -> Result<Self> {
        if factors.len() != self.shape()[0] {
            return Err(mismatch(NAME, "the factors do not fit B"));
        }
        Ok(Self { factors: Some(factors.into()), ..self.clone() })
    }

    /// Whether it is the sum `scale * B (A x)` and nothing more.
    #[must_use]
    pub fn is_sum(&self) -> bool {
        self.factors.is_none()
    }

    /// `A [rank, in]` and `B [out, rank]` with the values that were packed, f32.
    ///
    /// # Errors
    /// Where there is no memory for them.
    pub fn matrices(&self) -> Result<[Tensor; 2]> {
        let unpack = |packed: &Arc<PackedWeight>| {
            Weight::Packed(Arc::clone(packed)).to_tensor()?.to_dtype(DType::F32)
        };
        Ok([unpack(&self.a)?, unpack(&self.b)?])
    }

    /// Elements of A and of B.
    #[must_use]
    pub fn num_elements(&self) -> usize {
        [&self.a, &self.b].map(|packed| packed.shape().iter().product::<usize>()).iter().sum()
    }

    /// Bytes of both in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.a.num_bytes() + self.b.num_bytes()
    }

    /// Rows of A.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.a.shape()[0]
    }

    /// That of `B A`: output and input features.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.b.shape()[0], self.a.shape()[1]]
    }

    /// Bytes that are read and operations that are done for so many rows.
    pub(super) fn work(&self, rows: usize) -> (usize, usize) {
        (self.num_bytes(), 2 * rows * self.num_elements())
    }

    pub(super) fn segment(&self, rows: Range<usize>) -> LoraSegment<'_> {
        LoraSegment {
            rows,
            a: &self.a,
            b: &self.b,
            scale: self.scale,
            factors: self.factors.as_deref(),
        }
    }
}

/// Adds the contributions of several adapters, each to its rows of `output [rows, out]`, in place: the
/// serving body. Bit for bit `output + lora(..)` on these rows. Other rows cost nothing.
///
/// # Errors
/// Where shapes or dtypes do not fit, or rows lie outside.
pub fn add_in_place(
    output: &Tensor,
    x: &Tensor,
    segments: Vec<(Range<usize>, LoraPart)>,
) -> Result<()> {
    let _time = time(Op::Lora).work(|| {
        let of = |(rows, part): &(Range<usize>, LoraPart)| part.work(rows.len());
        segments.iter().map(of).fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
    });
    output.inplace_op2(&x.contiguous()?, &AddRows { segments })
}

#[allow(clippy::cast_possible_truncation)]
pub(super) fn narrow(scale: f64) -> f32 {
    scale as f32
}

/// `x A^T`, `[rows, rank]`.
pub(super) fn shrink(x: &[f32], a: &[f32], (rank, in_features): (usize, usize)) -> Vec<f32> {
    let mut hidden = vec![0.0; x.len() / in_features * rank];
    linear(best(), x, a, in_features, &mut hidden);
    hidden
}

/// `out [+]= scale * hidden B^T`.
pub(super) fn expand(
    hidden: &[f32],
    b: &[f32],
    rank: usize,
    (scale, accumulate): (f32, bool),
    out: &mut [f32],
) {
    let out_features = b.len() / rank;
    let mut transposed = vec![0.0; b.len()];
    for (column, row) in b.chunks_exact(rank).enumerate() {
        for (k, value) in row.iter().enumerate() {
            transposed[k * out_features + column] = *value;
        }
    }
    let (a_strides, shape) = ((rank, 1), (hidden.len() / rank, rank, out_features));
    MatmulJob { a: hidden, a_strides, b: &transposed, shape, alpha: scale, accumulate }
        .run(best(), out);
}

struct Lora {
    scale: f32,
}

impl CustomOp3 for Lora {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rank, in_features) = a_layout.shape().dims2()?;
        let (out_features, b_rank) = b_layout.shape().dims2()?;
        let (rows, x_features) = x_layout.shape().dims2()?;
        if rank != b_rank || x_features != in_features {
            return Err(mismatch(NAME, "x, A and B do not fit each other"));
        }
        let hidden = shrink(
            f32_slice(x, x_layout, NAME)?,
            f32_slice(a, a_layout, NAME)?,
            (rank, in_features),
        );
        let mut out = vec![0.0; rows * out_features];
        expand(&hidden, f32_slice(b, b_layout, NAME)?, rank, (self.scale, false), &mut out);
        Ok((CpuStorage::F32(out), (rows, out_features).into()))
    }

    /// With `h = x A^T` and `g = scale * dy B`: `dx = g A`, `dA = g^T x`, `dB = scale * dy^T h`.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rank, in_features) = a.dims2()?;
        let (rows, out_features) = grad.dims2()?;
        let mut grad_hidden = vec![0.0; rows * rank];
        let mut grad_x = vec![0.0; if x.track_op() { rows * in_features } else { 0 }];
        let mut grad_a = vec![0.0; rank * in_features];
        let mut grad_b = vec![0.0; out_features * rank];
        let run = |a: &[f32], a_strides, b: &[f32], shape, alpha, out: &mut [f32]| {
            MatmulJob { a, a_strides, b, shape, alpha, accumulate: false }.run(best(), out);
        };
        with_f32(x, NAME, |x| {
            with_f32(grad, NAME, |grad| {
                with_f32(a, NAME, |a| {
                    with_f32(b, NAME, |b| {
                        let hidden = shrink(x, a, (rank, in_features));
                        let shape = (rows, out_features, rank);
                        run(grad, (out_features, 1), b, shape, self.scale, &mut grad_hidden);
                        if !grad_x.is_empty() {
                            let shape = (rows, rank, in_features);
                            run(&grad_hidden, (rank, 1), a, shape, 1.0, &mut grad_x);
                        }
                        let shape = (rank, rows, in_features);
                        run(&grad_hidden, (1, rank), x, shape, 1.0, &mut grad_a);
                        let shape = (out_features, rows, rank);
                        run(grad, (1, out_features), &hidden, shape, self.scale, &mut grad_b);
                        Ok(())
                    })
                })
            })
        })?;
        let grad_x = if grad_x.is_empty() && rows > 0 {
            None
        } else {
            Some(tensor(grad_x, (rows, in_features))?)
        };
        let grad_a = tensor(grad_a, (rank, in_features))?;
        Ok((grad_x, Some(grad_a), Some(tensor(grad_b, (out_features, rank))?)))
    }
}

struct AddRows {
    segments: Vec<(Range<usize>, LoraPart)>,
}

impl InplaceOp2 for AddRows {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        output: &mut CpuStorage,
        output_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let (rows, out_features) = output_layout.shape().dims2()?;
        let (x_rows, in_features) = x_layout.shape().dims2()?;
        let (start, end) = output_layout
            .contiguous_offsets()
            .ok_or_else(|| mismatch(NAME, "the output is not contiguous"))?;
        let x = f32_slice(x, x_layout, NAME)?;
        let CpuStorage::F32(output) = output else {
            return Err(mismatch(NAME, "the output is not f32"));
        };
        let mut segments = Vec::with_capacity(self.segments.len());
        for (range, part) in &self.segments {
            if range.end > rows.min(x_rows) {
                return Err(mismatch(NAME, &format!("rows {range:?} lie outside the batch")));
            }
            if part.shape() != [out_features, in_features] || !part.is_sum() {
                return Err(mismatch(NAME, "x, A and B do not fit each other"));
            }
            segments.push(part.segment(range.clone()));
        }
        let features = (in_features, out_features);
        add_lora(best(), x, &segments, features, &mut output[start..end]);
        Ok(())
    }
}
