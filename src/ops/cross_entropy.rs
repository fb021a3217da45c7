//! Cross-entropy fused with the output head: the logits of a few hundred rows exist at a time, never
//! all of them.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::storage::{
    WeightSlice, f32_slice, for_weight, mismatch, tensor, weight_slice, with_f32, with_weight,
};
use crate::kernels::{LinearJob, MatmulJob, Weight, best, for_each_rows};

const NAME: &str = "cross_entropy";
/// Logits held at a time.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// Losses of `hidden [rows, size]` against `targets` under the head `weight [vocab, size]`.
///
/// Returns `[2, rows]`: row 0 the negative log-likelihood of each target (differentiable in `hidden`,
/// and in `weight` where it is a variable), row 1 is 1 where the target has the greatest logit.
///
/// # Errors
/// Where shapes or dtypes do not fit, or a target lies outside the vocabulary.
pub fn cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Tensor> {
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
    let job = Job { targets: targets.into(), vocab, size };
    let hidden = hidden.contiguous()?;
    if weight.track_op() {
        hidden.apply_op2(weight, TrainableHead { job })
    } else {
        hidden.apply_op1(FrozenHead { job, weight: weight.clone() })
    }
}

struct Job {
    targets: Arc<[u32]>,
    vocab: usize,
    size: usize,
}

impl Job {
    fn rows_at_once(&self) -> usize {
        (CHUNK_ELEMENTS / self.vocab).max(1)
    }

    /// Calls `body(first_row, hidden rows, logits)` chunk by chunk.
    fn for_each_chunk<W: Weight>(
        &self,
        hidden: &[f32],
        weight: &[W],
        mut body: impl FnMut(usize, &[f32], &mut [f32]),
    ) {
        let (rows, size, vocab) = (self.rows_at_once(), self.size, self.vocab);
        let mut logits = vec![0.0; rows.min(self.targets.len()) * vocab];
        for (index, x) in hidden.chunks(rows * size).enumerate() {
            let logits = &mut logits[..x.len() / size * vocab];
            let job = LinearJob { x, weight, bias: None, in_features: size, out_features: vocab };
            job.run(best(), logits);
            body(index * rows, x, logits);
        }
    }

    #[allow(clippy::float_cmp)]
    fn forward(&self, hidden: &[f32], weight: &WeightSlice<'_>) -> CpuStorage {
        let count = self.targets.len();
        let mut pairs = vec![[0.0_f32; 2]; count];
        for_weight!(weight, |weight| {
            self.for_each_chunk(hidden, weight, |first, x, logits| {
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
            });
        });
        let column = |index: usize| pairs.iter().map(move |pair| pair[index]);
        CpuStorage::F32(column(0).chain(column(1)).collect())
    }

    /// `dlogits = (softmax - onehot) * dnll`, from it `dhidden = dlogits W`, `dW = dlogits^T hidden`.
    fn backward(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
        train_weight: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (count, size, vocab) = (self.targets.len(), self.size, self.vocab);
        let mut grad_hidden = vec![0.0; count * size];
        let mut grad_weight = vec![0.0; if train_weight { vocab * size } else { 0 }];
        with_f32(hidden, NAME, |hidden| {
            with_f32(grad, NAME, |grad| {
                with_weight(weight, NAME, |weight| {
                    for_weight!(weight, |weight| {
                        self.for_each_chunk(hidden, weight, |first, x, logits| {
                            for_each_rows(logits, vocab, vocab * 8, |start, logits| {
                                for (index, row) in logits.chunks_exact_mut(vocab).enumerate() {
                                    let at = first + start + index;
                                    let (max, sum) = best().softmax_stats(row);
                                    best().softmax_scaled(row, max, grad[at] / sum);
                                    row[self.targets[at] as usize] -= grad[at];
                                }
                            });
                            let rows = x.len() / size;
                            let out = &mut grad_hidden[first * size..(first + rows) * size];
                            let shape = (rows, vocab, size);
                            let (a, a_strides) = (&*logits, (vocab, 1));
                            MatmulJob {
                                a,
                                a_strides,
                                b: weight,
                                shape,
                                alpha: 1.0,
                                accumulate: false,
                            }
                            .run(best(), out);
                            if train_weight {
                                let (shape, a_strides) = ((vocab, rows, size), (1, vocab));
                                MatmulJob {
                                    a,
                                    a_strides,
                                    b: x,
                                    shape,
                                    alpha: 1.0,
                                    accumulate: true,
                                }
                                .run(best(), &mut grad_weight);
                            }
                        });
                    });
                    Ok(())
                })
            })
        })?;
        let grad_weight =
            if train_weight { Some(tensor(grad_weight, (vocab, size))?) } else { None };
        Ok((tensor(grad_hidden, (count, size))?, grad_weight))
    }
}

struct FrozenHead {
    job: Job,
    weight: Tensor,
}

impl CustomOp1 for FrozenHead {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let hidden = f32_slice(hidden, layout, NAME)?;
        let losses =
            with_weight(&self.weight, NAME, |weight| Ok(self.job.forward(hidden, &weight)))?;
        Ok((losses, (2, self.job.targets.len()).into()))
    }

    fn bwd(&self, hidden: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.job.backward(hidden, &self.weight, grad, false)?.0))
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
        let weight = weight_slice(weight, weight_layout, NAME)?;
        let losses = self.job.forward(f32_slice(hidden, layout, NAME)?, &weight);
        Ok((losses, (2, self.job.targets.len()).into()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (hidden, weight) = self.job.backward(hidden, weight, grad, true)?;
        Ok((Some(hidden), weight))
    }
}
