//! Tables of which an adapter has some rows of its own: lookups, logits and losses with these rows in
//! place of the base's, without a copy of the table.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, InplaceOp2, Layout, Result, Shape, Tensor};

use super::{
    soft_cap::slope,
    storage::{f32_slice, mismatch, tensor, with_f32},
    weight::Weight,
};
use crate::kernels::{self, MatmulJob, best, for_each_rows};

const NAME: &str = "own_rows";
/// Rows whose logits exist at a time.
const CHUNK_ROWS: usize = 96;

/// `x [rows, size]` with row `to` replaced by `values [n, size]`'s row `from` for each of `places
/// (to, from)`. Gradients of both.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn replace_rows(x: &Tensor, values: &Tensor, places: Vec<(usize, usize)>) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&values.contiguous()?, Replace { places })
}

/// Puts `own [places, ids]` into the columns `ids` of the rows `places` of `logits [rows, vocab]`.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn put_columns(logits: &Tensor, own: &Tensor, places: Vec<usize>, ids: &[u32]) -> Result<()> {
    logits.inplace_op2(&own.contiguous()?, &PutColumns { places, ids: ids.into() })
}

/// As [`cross_entropy`](super::cross_entropy::cross_entropy), with `values [ids, size]` in place of the
/// rows `ids` of the `head [vocab, size]`, which is frozen, and with a soft cap on the logits where there
/// is one. Gradients of `hidden` and `values`.
///
/// # Errors
/// Where shapes or dtypes do not fit, or a target lies outside the vocabulary.
pub fn cross_entropy(
    hidden: &Tensor,
    head: &Weight,
    (ids, values): (&Arc<[u32]>, &Tensor),
    (targets, soft_cap): (&[u32], Option<f64>),
) -> Result<Tensor> {
    let (vocab, size) = head.dims2()?;
    if hidden.dims2()? != (targets.len(), size) || values.dims2()? != (ids.len(), size) {
        return Err(mismatch(NAME, "hidden, head, own rows and targets do not fit each other"));
    }
    if let Some(id) = targets.iter().chain(&**ids).find(|id| **id as usize >= vocab) {
        return Err(mismatch(NAME, &format!("token {id} in a vocabulary of {vocab}")));
    }
    let (ids, targets, head) = (Arc::clone(ids), targets.into(), head.clone());
    #[allow(clippy::cast_possible_truncation)]
    let soft_cap = soft_cap.map(|cap| cap as f32);
    hidden.contiguous()?.apply_op2(
        &values.contiguous()?,
        CrossEntropy { ids, targets, head, vocab, size, soft_cap },
    )
}

struct Replace {
    places: Vec<(usize, usize)>,
}

impl CustomOp2 for Replace {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, size) = x_layout.shape().dims2()?;
        if values_layout.shape().dims2()?.1 != size {
            return Err(mismatch(NAME, "x and the own rows differ in width"));
        }
        let mut out = f32_slice(x, x_layout, NAME)?.to_vec();
        let values = f32_slice(values, values_layout, NAME)?;
        for (to, from) in &self.places {
            out[to * size..][..size].copy_from_slice(&values[from * size..][..size]);
        }
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        values: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, size) = values.dims2()?;
        with_f32(grad, NAME, |grad| {
            let mut of_values = vec![0.0; rows * size];
            for (to, from) in &self.places {
                let row = &grad[to * size..][..size];
                let sums = &mut of_values[from * size..][..size];
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
            let of_values = tensor(of_values, (rows, size))?;
            if !x.track_op() {
                return Ok((None, Some(of_values)));
            }
            let mut of_x = grad.to_vec();
            for (to, _) in &self.places {
                of_x[to * size..][..size].fill(0.0);
            }
            Ok((Some(tensor(of_x, x.shape().clone())?), Some(of_values)))
        })
    }
}

struct PutColumns {
    places: Vec<usize>,
    ids: Arc<[u32]>,
}

impl InplaceOp2 for PutColumns {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        logits: &mut CpuStorage,
        logits_layout: &Layout,
        own: &CpuStorage,
        own_layout: &Layout,
    ) -> Result<()> {
        let (rows, vocab) = logits_layout.shape().dims2()?;
        let (begin, end) = logits_layout
            .contiguous_offsets()
            .ok_or_else(|| mismatch(NAME, "the logits are not contiguous"))?;
        let CpuStorage::F32(logits) = logits else {
            return Err(mismatch(NAME, "the logits are not f32"));
        };
        let own = f32_slice(own, own_layout, NAME)?;
        let fits = own.len() == self.places.len() * self.ids.len()
            && self.places.iter().all(|place| *place < rows)
            && self.ids.iter().all(|id| (*id as usize) < vocab);
        if !fits {
            return Err(mismatch(NAME, "the own columns do not fit into the logits"));
        }
        let logits = &mut logits[begin..end];
        for (place, own) in self.places.iter().zip(own.chunks_exact(self.ids.len().max(1))) {
            put(&self.ids, own, &mut logits[place * vocab..][..vocab]);
        }
        Ok(())
    }
}

struct CrossEntropy {
    ids: Arc<[u32]>,
    targets: Arc<[u32]>,
    head: Weight,
    vocab: usize,
    size: usize,
    soft_cap: Option<f32>,
}

impl CrossEntropy {
    /// Calls `body(first row, hidden rows, logits)` chunk by chunk.
    fn for_each_chunk(
        &self,
        hidden: &[f32],
        values: &[f32],
        mut body: impl FnMut(usize, &[f32], &mut [f32]),
    ) -> Result<()> {
        let Self { ids, vocab, size, .. } = self;
        let mut logits = vec![0.0; CHUNK_ROWS.min(self.targets.len()) * vocab];
        for (index, x) in hidden.chunks(CHUNK_ROWS * size).enumerate() {
            let rows = x.len() / size;
            let logits = &mut logits[..rows * vocab];
            match &self.head {
                Weight::Packed(head) => head.linear(best(), x, None, logits),
                Weight::Plain(head) => with_f32(head, NAME, |head| {
                    kernels::linear(best(), x, head, *size, logits);
                    Ok(())
                })?,
            }
            let mut own = vec![0.0; rows * ids.len()];
            kernels::linear(best(), x, values, *size, &mut own);
            for (own, logits) in
                own.chunks_exact(ids.len().max(1)).zip(logits.chunks_exact_mut(*vocab))
            {
                put(ids, own, logits);
            }
            if let Some(cap) = self.soft_cap {
                best().soft_cap(logits, cap);
            }
            body(index * CHUNK_ROWS, x, logits);
        }
        Ok(())
    }
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    #[allow(clippy::float_cmp)]
    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let count = self.targets.len();
        let mut out = vec![0.0_f32; 2 * count];
        let (losses, hits) = out.split_at_mut(count);
        let hidden = f32_slice(hidden, hidden_layout, NAME)?;
        let values = f32_slice(values, values_layout, NAME)?;
        self.for_each_chunk(hidden, values, |first, _, logits| {
            for (index, row) in logits.chunks_exact(self.vocab).enumerate() {
                let target = self.targets[first + index] as usize;
                let (max, sum) = best().softmax_stats(row);
                let is_first = row.iter().position(|logit| *logit == max) == Some(target);
                losses[first + index] = max - row[target] + sum.ln();
                hits[first + index] = f32::from(u8::from(is_first));
            }
        })?;
        Ok((CpuStorage::F32(out), (2, count).into()))
    }

    /// `dlogits = (softmax - onehot) * dnll`; its own columns go to the own rows, the others to the head.
    fn bwd(
        &self,
        hidden: &Tensor,
        values: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (count, size, vocab, own_rows) =
            (self.targets.len(), self.size, self.vocab, self.ids.len());
        let mut of_hidden = vec![0.0; count * size];
        let mut of_values = vec![0.0; own_rows * size];
        with_f32(hidden, NAME, |hidden| {
            with_f32(values, NAME, |values| {
                with_f32(grad, NAME, |grad| {
                    self.for_each_chunk(hidden, values, |first, x, logits| {
                        let rows = x.len() / size;
                        for_each_rows(logits, vocab, vocab * 8, |start, logits| {
                            for (index, row) in logits.chunks_exact_mut(vocab).enumerate() {
                                let at = first + start + index;
                                let capped = self.soft_cap.map(|cap| (row.to_vec(), cap));
                                let (max, sum) = best().softmax_stats(row);
                                best().softmax_scaled(row, max, grad[at] / sum);
                                row[self.targets[at] as usize] -= grad[at];
                                if let Some((logits, cap)) = capped {
                                    let slopes = logits.iter().map(|logit| slope(*logit, cap));
                                    row.iter_mut().zip(slopes).for_each(|(to, s)| *to *= s);
                                }
                            }
                        });
                        let mut own = Vec::with_capacity(rows * own_rows);
                        for row in logits.chunks_exact_mut(vocab) {
                            own.extend(
                                self.ids.iter().map(|id| std::mem::take(&mut row[*id as usize])),
                            );
                        }
                        let out = &mut of_hidden[first * size..(first + rows) * size];
                        self.head_gradient(logits, out);
                        let (a_strides, shape) = ((own_rows, 1), (rows, own_rows, size));
                        MatmulJob {
                            a: &own,
                            a_strides,
                            b: values,
                            shape,
                            alpha: 1.0,
                            accumulate: true,
                        }
                        .run(best(), out);
                        let (a_strides, shape) = ((1, own_rows), (own_rows, rows, size));
                        MatmulJob { a: &own, a_strides, b: x, shape, alpha: 1.0, accumulate: true }
                            .run(best(), &mut of_values);
                    })
                })
            })
        })?;
        let of_hidden = tensor(of_hidden, (count, size))?;
        Ok((Some(of_hidden), Some(tensor(of_values, (own_rows, size))?)))
    }
}

impl CrossEntropy {
    /// `dhidden = dlogits W`.
    fn head_gradient(&self, grad: &[f32], out: &mut [f32]) {
        match &self.head {
            Weight::Packed(head) => head.input_gradient(best(), grad, out),
            Weight::Plain(head) => {
                let head = with_f32(head, NAME, |head| {
                    kernels::input_gradient(best(), grad, head, self.size, out);
                    Ok(())
                });
                debug_assert!(head.is_ok(), "the forward pass has read it");
            }
        }
    }
}

fn put(ids: &[u32], own: &[f32], logits: &mut [f32]) {
    for (id, value) in ids.iter().zip(own) {
        logits[*id as usize] = *value;
    }
}
