//! Rows of the embedding table.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    profile::{Op, time},
    storage::{f32_slice, mismatch, tensor, with_f32},
    weight::Weight,
};
use crate::kernels::{buffer, for_each_rows};

const NAME: &str = "embedding";
/// Multiply-adds that an element from a panel is worth.
const WORK: usize = 8;

/// `table [vocab, hidden]`, ids -> `[ids.len(), hidden]`, f32. A plain table receives a gradient.
///
/// # Errors
/// Where an id lies outside the table.
pub fn embedding(table: &Weight, ids: &[u32]) -> Result<Tensor> {
    let _time = time(Op::Embedding);
    let (vocab, hidden) = table.dims2()?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(mismatch(NAME, &format!("token id {id} in a vocabulary of {vocab}")));
    }
    match table {
        Weight::Plain(table) => table.contiguous()?.apply_op1(Embedding { ids: ids.into() }),
        Weight::Packed(table) => {
            let mut out = buffer(ids.len() * hidden);
            for_each_rows(&mut out, hidden, hidden * WORK, |first, rows| {
                for (id, row) in ids[first..].iter().zip(rows.chunks_exact_mut(hidden)) {
                    table.row(*id as usize, row);
                }
            });
            tensor(out, (ids.len(), hidden))
        }
    }
}

struct Embedding {
    ids: Arc<[u32]>,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = layout.shape().dims2()?;
        let table = f32_slice(storage, layout, NAME)?;
        let mut out = Vec::with_capacity(self.ids.len() * hidden);
        for id in &*self.ids {
            out.extend_from_slice(&table[*id as usize * hidden..][..hidden]);
        }
        Ok((CpuStorage::F32(out), (self.ids.len(), hidden).into()))
    }

    fn bwd(&self, table: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (vocab, hidden) = table.dims2()?;
        let mut out = vec![0.0; vocab * hidden];
        with_f32(grad, NAME, |grad| {
            for (id, row) in self.ids.iter().zip(grad.chunks_exact(hidden)) {
                let start = *id as usize * hidden;
                for (sum, value) in out[start..start + hidden].iter_mut().zip(row) {
                    *sum += value;
                }
            }
            Ok(())
        })?;
        Ok(Some(tensor(out, (vocab, hidden))?))
    }
}
