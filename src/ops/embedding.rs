//! Rows of the embedding table.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::storage::{for_weight, mismatch, tensor, weight_slice, with_f32};
use crate::kernels::Weight as _;

const NAME: &str = "embedding";

/// `table [vocab, hidden]`, ids -> `[ids.len(), hidden]`, f32.
///
/// # Errors
/// Where an id lies outside the table.
pub fn embedding(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.apply_op1(Embedding { ids: ids.into() })
}

struct Embedding {
    ids: Arc<[u32]>,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (vocab, hidden) = layout.shape().dims2()?;
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(mismatch(NAME, &format!("token id {id} in a vocabulary of {vocab}")));
        }
        let mut out = Vec::with_capacity(self.ids.len() * hidden);
        for_weight!(weight_slice(storage, layout, NAME)?, |table| {
            for id in &*self.ids {
                let row = &table[*id as usize * hidden..][..hidden];
                out.extend(row.iter().map(|value| value.to_f32()));
            }
        });
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
