//! Causal self-attention: over whole sequences with gradients, or over a paged cache.

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor};

use super::{
    profile::{Op, time},
    storage::{f32_slice, mismatch, tensor, whole_slice, with_f32},
};
use crate::kernels::{
    AttentionBackward, AttentionForward, AttentionShape, KvForm, KvPanel, KvPanelMut, KvPanels,
    KvSide, LANES, QuerySpan, best, buffer,
};

const NAME: &str = "attention";
const WRITE: &str = "write_cache";
const NO_FORM: &str = "the cache holds neither f32, bf16 nor bytes";

/// Attention within whole sequences. `q [rows, heads * head_dim]`, `k` and `v`
/// `[rows, kv_heads * head_dim]`; `sequences` are their rows, in order.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape,
    sequences: &Arc<[Range<usize>]>,
) -> Result<Tensor> {
    let _time = time(Op::Attention);
    let op = WholeAttention { shape, sequences: sequences.clone() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// One sequence's part of a [`paged_attention`].
#[derive(Clone)]
pub struct PagedSpan {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Position of the first of them.
    pub first_position: usize,
    /// Physical block of each sixteen positions.
    pub block_table: Arc<[u32]>,
}

/// Attention over cached keys and values (which already hold this step's), in f32, bf16, or int8 with
/// its scales as bytes. No gradient.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn paged_attention(
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    shape: AttentionShape,
    spans: &Arc<[PagedSpan]>,
) -> Result<Tensor> {
    let _time = time(Op::Attention).work(|| paged_work(spans, shape, keys.dtype().size_in_bytes()));
    q.contiguous()?.apply_op3_no_bwd(keys, values, &Paged { shape, spans: spans.clone() })
}

/// Bytes that are read of keys and values, each once a sequence, and operations on them.
fn paged_work(spans: &[PagedSpan], shape: AttentionShape, element_bytes: usize) -> (usize, usize) {
    let (mut positions, mut pairs) = (0, 0);
    let seen = |positions: usize| shape.window.map_or(positions, |window| positions.min(window));
    for PagedSpan { rows, first_position, .. } in spans {
        positions += seen(*first_position) + rows.len();
        pairs += rows.len() * seen(first_position + rows.len().div_ceil(2));
    }
    let bytes = 2 * positions * shape.kv_heads * shape.head_dim * element_bytes;
    (bytes, 4 * pairs * shape.heads * shape.head_dim)
}

/// Writes `rows [slots.len(), kv_heads * head_dim]` into a panel of the cache, in place.
///
/// # Errors
/// Where shapes do not fit or a slot lies outside.
pub fn write_cache(
    panel_tensor: &Tensor,
    side: KvSide,
    rows: &Tensor,
    shape: AttentionShape,
    slots: &Arc<[u32]>,
) -> Result<()> {
    let _time = time(Op::Attention);
    let op = WriteCache { side, shape, slots: slots.clone() };
    panel_tensor.inplace_op2(&rows.contiguous()?, &op)
}

struct WholeAttention {
    shape: AttentionShape,
    sequences: Arc<[Range<usize>]>,
}

impl CustomOp3 for WholeAttention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let queries = f32_slice(q, q_layout, NAME)?;
        let (k, v) = (f32_slice(k, k_layout, NAME)?, f32_slice(v, v_layout, NAME)?);
        // The sequences' keys and values take the cache's layout, one block after the other.
        let mut slots = Vec::new();
        let mut tables = Vec::new();
        let mut num_blocks = 0_u32;
        for range in &*self.sequences {
            let blocks = narrow(range.len().div_ceil(LANES))?;
            tables.push((num_blocks..num_blocks + blocks).collect::<Vec<_>>());
            let first = num_blocks * narrow(LANES)?;
            slots.extend(first..first + narrow(range.len())?);
            num_blocks += blocks;
        }
        if q_layout.dims()[0] != slots.len() {
            return Err(mismatch(NAME, "the sequences do not cover the rows"));
        }
        let panel = |side, rows| {
            let block_len = KvForm::F32.block_len(&self.shape, side);
            let mut panel = vec![0.0; num_blocks as usize * block_len];
            self.shape.write(side, rows, &slots, KvPanelMut::F32(&mut panel));
            panel
        };
        let (keys, values) = (panel(KvSide::Keys, k), panel(KvSide::Values, v));
        let spans: Vec<QuerySpan<'_>> = self
            .sequences
            .iter()
            .zip(&tables)
            .map(|(rows, block_table)| QuerySpan {
                rows: rows.clone(),
                first_position: 0,
                block_table,
            })
            .collect();
        let mut out = buffer(queries.len());
        let panels = KvPanels { keys: KvPanel::F32(&keys), values: KvPanel::F32(&values) };
        AttentionForward { shape: self.shape, panels, queries, spans: &spans }
            .run(best(), &mut out);
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = [q, k, v].map(|input| vec![0.0; input.elem_count()]);
        let [grad_q, grad_k, grad_v] = &mut grads;
        with_f32(q, NAME, |queries| {
            with_f32(k, NAME, |keys| {
                with_f32(v, NAME, |values| {
                    with_f32(out, NAME, |out| {
                        with_f32(grad, NAME, |grad_out| {
                            let (shape, sequences) = (self.shape, &*self.sequences);
                            AttentionBackward {
                                shape,
                                queries,
                                keys,
                                values,
                                out,
                                grad_out,
                                sequences,
                            }
                            .run(best(), (grad_q, grad_k, grad_v));
                            Ok(())
                        })
                    })
                })
            })
        })?;
        let [grad_q, grad_k, grad_v] = grads;
        let like = |grad, input: &Tensor| tensor(grad, input.shape().clone()).map(Some);
        Ok((like(grad_q, q)?, like(grad_k, k)?, like(grad_v, v)?))
    }
}

struct Paged {
    shape: AttentionShape,
    spans: Arc<[PagedSpan]>,
}

impl CustomOp3 for Paged {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let queries = f32_slice(q, q_layout, NAME)?;
        let panels = KvPanels { keys: panel(k, k_layout)?, values: panel(v, v_layout)? };
        let spans: Vec<QuerySpan<'_>> = self
            .spans
            .iter()
            .map(|span| QuerySpan {
                rows: span.rows.clone(),
                first_position: span.first_position,
                block_table: &span.block_table,
            })
            .collect();
        let mut out = buffer(queries.len());
        AttentionForward { shape: self.shape, panels, queries, spans: &spans }
            .run(best(), &mut out);
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }
}

/// A panel of the cache: its dtype says its form.
fn panel<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<KvPanel<'a>> {
    #[allow(clippy::wildcard_enum_match_arm)]
    match storage {
        CpuStorage::F32(_) => Ok(KvPanel::F32(whole_slice(storage, layout, NAME)?)),
        CpuStorage::BF16(_) => Ok(KvPanel::Bf16(whole_slice(storage, layout, NAME)?)),
        CpuStorage::U8(_) => Ok(KvPanel::Int8(whole_slice(storage, layout, NAME)?)),
        _ => Err(mismatch(NAME, NO_FORM)),
    }
}

struct WriteCache {
    side: KvSide,
    shape: AttentionShape,
    slots: Arc<[u32]>,
}

impl InplaceOp2 for WriteCache {
    fn name(&self) -> &'static str {
        WRITE
    }

    fn cpu_fwd(
        &self,
        panel: &mut CpuStorage,
        _panel_layout: &Layout,
        rows: &CpuStorage,
        layout: &Layout,
    ) -> Result<()> {
        let rows = f32_slice(rows, layout, WRITE)?;
        #[allow(clippy::wildcard_enum_match_arm)]
        let panel = match panel {
            CpuStorage::F32(panel) => KvPanelMut::F32(panel),
            CpuStorage::BF16(panel) => KvPanelMut::Bf16(panel),
            CpuStorage::U8(panel) => KvPanelMut::Int8(panel),
            _ => return Err(mismatch(WRITE, NO_FORM)),
        };
        let capacity = panel.capacity(&self.shape, self.side);
        if let Some(slot) = self.slots.iter().find(|slot| **slot as usize >= capacity) {
            return Err(mismatch(WRITE, &format!("slot {slot} of {capacity}")));
        }
        self.shape.write(self.side, rows, &self.slots, panel);
        Ok(())
    }
}

fn narrow(count: usize) -> Result<u32> {
    u32::try_from(count).map_err(|_| mismatch(NAME, &format!("{count} rows are too many")))
}
