//! Cross-entropy fused with the output head: the logits of a few hundred rows exist at a time, never
//! all of them.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    soft_cap::slope,
    storage::{f32_slice, mismatch, tensor, with_f32},
    weight::Weight,
};
use crate::kernels::{self, MatmulJob, PackedWeight, best, for_each_rows};

const NAME: &str = "cross_entropy";
/// Logits held at a time, unless there are so many for one row that a chunk would have fewer than
/// `MIN_ROWS`: each chunk passes the whole head by, and backward turns it besides.
const CHUNK_ELEMENTS: usize = 1 << 20;
const MIN_ROWS: usize = 96;

/// Losses of `hidden [rows, size]` against `targets` under the head `weight [vocab, size]`.
///
/// Returns `[2, rows]`: row 0 the negative log-likelihood of each target (differentiable in `hidden`,
/// and in `weight` where it is a variable), row 1 is 1 where the target has the greatest logit.
///
/// # Errors
/// Where shapes or dtypes do not fit, or a target lies outside the vocabulary.
pub fn cross_entropy(hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<Tensor> {
    capped_cross_entropy(hidden, weight, targets, None)
}

/// [`cross_entropy`] of logits that become `cap * tanh(logit / cap)` first, where there is a cap.
///
/// # Errors
/// As [`cross_entropy`].
pub fn capped_cross_entropy(
    hidden: &Tensor,
    weight: &Weight,
    targets: &[u32],
    soft_cap: Option<f64>,
) -> Result<Tensor> {
    let (vocab, size) = weight.dims2()?;
    let (rows, hidden_size) = hidden.dims2()?;
    if rows != targets.len() || hidden_size != size {
        let what =
            format!("hidden [{rows}, {hidden_size}], head {size}, {} targets", targets.len());
        return Err(mismatch(NAME, &what));
    }
    if let Some(target) = targets.iter().find(|target| **target as usize >= vocab) {
        return Err(mismatch(NAME, &format!("target {target} in a vocabulary of {vocab}")));
    }
    #[allow(clippy::cast_possible_truncation)]
    let soft_cap = soft_cap.map(|cap| cap as f32);
    let job = Job { targets: targets.into(), vocab, size, soft_cap };
    let hidden = hidden.contiguous()?;
    match weight {
        Weight::Plain(weight) => hidden.apply_op2(weight, TrainableHead { job }),
        Weight::Packed(weight) => {
            let slopes = hidden.track_op().then(OnceLock::new);
            hidden.apply_op1(FrozenHead { job, weight: Arc::clone(weight), slopes })
        }
    }
}

/// The head, frozen or `[vocab, size]` as rows.
#[derive(Clone, Copy)]
enum Head<'a> {
    Packed(&'a PackedWeight),
    Rows(&'a [f32]),
}

impl Head<'_> {
    /// `out = dlogits W`.
    fn input_gradient(self, logits: &[f32], size: usize, out: &mut [f32]) {
        match self {
            Head::Packed(weight) => weight.input_gradient(best(), logits, out),
            Head::Rows(weight) => kernels::input_gradient(best(), logits, weight, size, out),
        }
    }
}

struct Job {
    targets: Arc<[u32]>,
    vocab: usize,
    size: usize,
    soft_cap: Option<f32>,
}

impl Job {
    fn rows_at_once(&self) -> usize {
        (CHUNK_ELEMENTS / self.vocab).max(MIN_ROWS)
    }

    /// Calls `body(first_row, hidden rows, logits)` chunk by chunk.
    fn for_each_chunk(
        &self,
        hidden: &[f32],
        head: Head<'_>,
        mut body: impl FnMut(usize, &[f32], &mut [f32]),
    ) {
        let (rows, size, vocab) = (self.rows_at_once(), self.size, self.vocab);
        let mut logits = vec![0.0; rows.min(self.targets.len()) * vocab];
        for (index, x) in hidden.chunks(rows * size).enumerate() {
            let logits = &mut logits[..x.len() / size * vocab];
            match head {
                Head::Packed(weight) => weight.linear(best(), x, None, logits),
                Head::Rows(weight) => kernels::linear(best(), x, weight, size, logits),
            }
            if let Some(cap) = self.soft_cap {
                for_each_rows(logits, vocab, vocab * 8, |_, logits| best().soft_cap(logits, cap));
            }
            body(index * rows, x, logits);
        }
    }

    /// The derivatives of a row's capped logits by the uncapped ones; empty without a cap.
    fn cap_slopes(&self, row: &[f32]) -> Vec<f32> {
        let slopes = self.soft_cap.map(|cap| row.iter().map(|logit| slope(*logit, cap)).collect());
        slopes.unwrap_or_default()
    }

    /// The losses. Where `slopes` is not empty it receives `d nll / d hidden`, `[rows, size]`.
    #[allow(clippy::float_cmp)]
    fn forward(&self, hidden: &[f32], head: Head<'_>, slopes: &mut [f32]) -> CpuStorage {
        let count = self.targets.len();
        let mut pairs = vec![[0.0_f32; 2]; count];
        self.for_each_chunk(hidden, head, |first, x, logits| {
            let rows = first * self.size..first * self.size + x.len();
            let pairs = &mut pairs[first..first + x.len() / self.size];
            for_each_rows(pairs, 1, self.vocab * 8, |start, pairs| {
                for (index, pair) in pairs.iter_mut().enumerate() {
                    let row = &logits[(start + index) * self.vocab..][..self.vocab];
                    let target = self.targets[first + start + index] as usize;
                    let (max, sum) = best().softmax_stats(row);
                    let is_first = row.iter().position(|logit| *logit == max) == Some(target);
                    *pair = [max - row[target] + sum.ln(), f32::from(u8::from(is_first))];
                }
            });
            if let Some(slopes) = slopes.get_mut(rows) {
                self.logit_slopes(logits, first, |_| 1.0);
                head.input_gradient(logits, self.size, slopes);
            }
        });
        let column = |index: usize| pairs.iter().map(move |pair| pair[index]);
        CpuStorage::F32(column(0).chain(column(1)).collect())
    }

    /// Logits of the rows from `first` on become `(softmax - onehot) * factor`, times the slope of a soft
    /// cap; the factor by row.
    fn logit_slopes(&self, logits: &mut [f32], first: usize, factor: impl Fn(usize) -> f32 + Sync) {
        for_each_rows(logits, self.vocab, self.vocab * 8, |start, logits| {
            for (index, row) in logits.chunks_exact_mut(self.vocab).enumerate() {
                let at = first + start + index;
                let cap_slopes = self.cap_slopes(row);
                let (max, sum) = best().softmax_stats(row);
                best().softmax_scaled(row, max, factor(at) / sum);
                row[self.targets[at] as usize] -= factor(at);
                row.iter_mut().zip(cap_slopes).for_each(|(grad, slope)| *grad *= slope);
            }
        });
    }

    /// `dlogits = (softmax - onehot) * dnll`, from it `dhidden = dlogits W` and `dW = dlogits^T hidden`.
    fn backward(&self, hidden: &[f32], weight: &[f32], grad: &[f32]) -> Result<(Tensor, Tensor)> {
        let (count, size, vocab) = (self.targets.len(), self.size, self.vocab);
        let (mut grad_hidden, mut grad_weight) = (vec![0.0; count * size], vec![0.0; vocab * size]);
        self.for_each_chunk(hidden, Head::Rows(weight), |first, x, logits| {
            self.logit_slopes(logits, first, |row| grad[row]);
            let rows = x.len() / size;
            let out = &mut grad_hidden[first * size..(first + rows) * size];
            Head::Rows(weight).input_gradient(logits, size, out);
            let (shape, a_strides) = ((vocab, rows, size), (1, vocab));
            MatmulJob { a: logits, a_strides, b: x, shape, alpha: 1.0, accumulate: true }
                .run(best(), &mut grad_weight);
        });
        Ok((tensor(grad_hidden, (count, size))?, tensor(grad_weight, (vocab, size))?))
    }
}

/// A head that is not trained passes by once: what backward needs follows from the logits that the
/// losses are made of, and is kept in place of them, `[rows, size]`.
struct FrozenHead {
    job: Job,
    weight: Arc<PackedWeight>,
    /// `d nll / d hidden`; `None` where nobody wants gradients.
    slopes: Option<OnceLock<Vec<f32>>>,
}

impl CustomOp1 for FrozenHead {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let hidden = f32_slice(hidden, layout, NAME)?;
        let mut slopes = vec![0.0; if self.slopes.is_some() { hidden.len() } else { 0 }];
        let losses = self.job.forward(hidden, Head::Packed(&self.weight), &mut slopes);
        if let Some(kept) = &self.slopes {
            kept.get_or_init(|| slopes);
        }
        Ok((losses, (2, self.job.targets.len()).into()))
    }

    fn bwd(&self, hidden: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let slopes = self.slopes.as_ref().and_then(OnceLock::get);
        let slopes = slopes.ok_or_else(|| mismatch(NAME, "no slopes were kept"))?;
        let mut grad_hidden = slopes.clone();
        with_f32(grad, NAME, |grad| {
            let rows = grad_hidden.chunks_exact_mut(self.job.size);
            rows.zip(grad).for_each(|(row, grad)| row.iter_mut().for_each(|x| *x *= grad));
            Ok(())
        })?;
        Ok(Some(tensor(grad_hidden, hidden.shape().clone())?))
    }
}

struct TrainableHead {
    job: Job,
}

impl CustomOp2 for TrainableHead {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let head = Head::Rows(f32_slice(weight, weight_layout, NAME)?);
        let losses = self.job.forward(f32_slice(hidden, layout, NAME)?, head, &mut []);
        Ok((losses, (2, self.job.targets.len()).into()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (hidden, weight) = with_f32(hidden, NAME, |hidden| {
            with_f32(grad, NAME, |grad| {
                with_f32(weight, NAME, |weight| self.job.backward(hidden, weight, grad))
            })
        })?;
        Ok((Some(hidden), Some(weight)))
    }
}
