//! What attention costs beside its bytes and its arithmetic: decode rows of eight streams over a paged
//! cache in each form, and prompts of 512 tokens, in the shapes of SmolLM2-135M and Qwen2.5-0.5B.
//!
//! `cargo bench --bench attention -- FILTER`, where the filter is part of a line's name (`decode`,
//! `Int8`). Each number is the best of several short windows, as in `kernels.rs`.
#![allow(clippy::cast_precision_loss, clippy::print_stdout, reason = "rounded numbers on a page")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

use std::{hint::black_box, time::Duration, time::Instant};

use half::bf16;
use rayon::prelude::*;
use tunesmith::kernels::{
    AttentionForward, AttentionShape, KvForm, KvPanel, KvPanelMut, KvPanels, KvSide, LANES,
    QuerySpan, best,
};

/// Caches are cycled through so much memory, so that they do not come from the CPU's.
const CYCLED_BYTES: usize = 256 << 20;
const WINDOW: Duration = Duration::from_millis(150);
const STREAMS: usize = 8;
const FORMS: [KvForm; 3] = [KvForm::F32, KvForm::Bf16, KvForm::Int8];
/// Name, layers, query heads, key heads; heads of 64.
const MODELS: [(&str, usize, usize, usize); 2] =
    [("SmolLM2-135M", 30, 9, 3), ("Qwen2.5-0.5B", 24, 14, 2)];

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let bandwidth = read_bandwidth();
    let threads = rayon::current_num_threads();
    println!("{} kernels, {threads} threads; reads {:.1} GB/s", best().name, bandwidth / 1e9);
    for (model, layers, heads, kv_heads) in MODELS {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim: 64,
            scale: 0.125,
            window: None,
            soft_cap: None,
        };
        for form in FORMS {
            for context in [128, 1024, 4096] {
                let name = format!("{model} decode {form:?}, {STREAMS} rows on {context:4}");
                if name.contains(&filter) {
                    decode(&name, (&shape, layers), form, context, bandwidth);
                }
            }
        }
        for (window, soft_cap) in [(None, None), (Some(128), None), (None, Some(50.0))] {
            let shape = AttentionShape { window, soft_cap, ..shape };
            let name = format!("{model} prompt of 512, window {window:?}, cap {soft_cap:?}");
            if name.contains(&filter) {
                prompt(&name, (&shape, layers));
            }
        }
    }
}

/// Keys and values of one layer.
enum Store {
    F32([Vec<f32>; 2]),
    Bf16([Vec<bf16>; 2]),
    Int8([Vec<u8>; 2]),
}

impl Store {
    fn new(form: KvForm, shape: &AttentionShape, blocks: usize) -> Self {
        let lens = [KvSide::Keys, KvSide::Values].map(|side| blocks * form.block_len(shape, side));
        let mut store = match form {
            KvForm::F32 => Self::F32(lens.map(|len| vec![0.0; len])),
            KvForm::Bf16 => Self::Bf16(lens.map(|len| vec![bf16::ZERO; len])),
            KvForm::Int8 => Self::Int8(lens.map(|len| vec![0; len])),
        };
        let width = shape.kv_heads * shape.head_dim;
        for block in 0..blocks {
            let rows: Vec<f32> = (0..LANES * width).map(|at| noise(block * 31 + at)).collect();
            let slots: Vec<u32> = (0..LANES).map(|at| (block * LANES + at) as u32).collect();
            for (index, side) in [KvSide::Keys, KvSide::Values].into_iter().enumerate() {
                let panel = match &mut store {
                    Self::F32(panels) => KvPanelMut::F32(&mut panels[index]),
                    Self::Bf16(panels) => KvPanelMut::Bf16(&mut panels[index]),
                    Self::Int8(panels) => KvPanelMut::Int8(&mut panels[index]),
                };
                shape.write(side, &rows, &slots, panel);
            }
        }
        store
    }

    fn panels(&self) -> KvPanels<'_> {
        let panel = |index: usize| match self {
            Self::F32(panels) => KvPanel::F32(&panels[index]),
            Self::Bf16(panels) => KvPanel::Bf16(&panels[index]),
            Self::Int8(panels) => KvPanel::Int8(&panels[index]),
        };
        KvPanels { keys: panel(0), values: panel(1) }
    }
}

/// One new token of each of eight streams.
fn decode(
    name: &str,
    (shape, layers): (&AttentionShape, usize),
    form: KvForm,
    context: usize,
    bandwidth: f64,
) {
    let blocks = context / LANES;
    let sides = form.block_len(shape, KvSide::Keys) + form.block_len(shape, KvSide::Values);
    let bytes = STREAMS * blocks * sides * form.element_bytes();
    let stores: Vec<Store> = (0..(CYCLED_BYTES / bytes).clamp(2, layers))
        .map(|_| Store::new(form, shape, STREAMS * blocks))
        .collect();
    // Blocks of the streams lie in turns, as streams that grow together get them.
    let tables: Vec<Vec<u32>> = (0..STREAMS)
        .map(|stream| (0..blocks).map(|block| (block * STREAMS + stream) as u32).collect())
        .collect();
    let width = shape.heads * shape.head_dim;
    let queries: Vec<f32> = (0..STREAMS * width).map(noise).collect();
    let spans: Vec<QuerySpan<'_>> = tables
        .iter()
        .enumerate()
        .map(|(row, block_table)| QuerySpan {
            rows: row..row + 1,
            first_position: context - 1,
            block_table,
        })
        .collect();
    let mut out = vec![0.0; queries.len()];
    let mut turn = 0;
    let seconds = best_seconds(|| {
        turn += 1;
        let panels = stores[turn % stores.len()].panels();
        AttentionForward { shape: *shape, panels, queries: &queries, spans: &spans }
            .run(best(), &mut out);
    });
    let rate = bytes as f64 / seconds;
    println!(
        "{name} {:8.1} us a layer, {:6.2} ms a step, {:5.1} GB/s ({:3.0} %)",
        seconds * 1e6,
        seconds * 1e3 * layers as f64,
        rate / 1e9,
        100.0 * rate / bandwidth,
    );
}

/// A prompt of 512 tokens alone.
fn prompt(name: &str, (shape, layers): (&AttentionShape, usize)) {
    const TOKENS: usize = 512;
    let store = Store::new(KvForm::F32, shape, TOKENS / LANES);
    let block_table: Vec<u32> = (0..(TOKENS / LANES) as u32).collect();
    let queries: Vec<f32> = (0..TOKENS * shape.heads * shape.head_dim).map(noise).collect();
    let spans = [QuerySpan { rows: 0..TOKENS, first_position: 0, block_table: &block_table }];
    let mut out = vec![0.0; queries.len()];
    let seconds = best_seconds(|| {
        AttentionForward {
            shape: *shape,
            panels: store.panels(),
            queries: &queries,
            spans: &spans,
        }
        .run(best(), &mut out);
    });
    let window = shape.window.unwrap_or(TOKENS);
    let pairs: usize = (1..=TOKENS).map(|seen| seen.min(window)).sum();
    let operations = (4 * pairs * shape.heads * shape.head_dim) as f64;
    println!(
        "{name} {:8.0} us a layer, {:6.2} ms in all, {:5.0} GFLOP/s",
        seconds * 1e6,
        seconds * 1e3 * layers as f64,
        operations / seconds / 1e9,
    );
}

/// Bytes a second that all threads read from memory.
fn read_bandwidth() -> f64 {
    let data = vec![1_u64; 1 << 26];
    let seconds = best_seconds(|| {
        let sums = data.par_chunks(1 << 20).with_max_len(1);
        black_box(sums.map(|chunk| chunk.iter().fold(0_u64, |a, b| a.wrapping_add(*b))).max());
    });
    (data.len() * size_of::<u64>()) as f64 / seconds
}

/// Seconds of one call, in the best of four windows.
fn best_seconds(mut body: impl FnMut()) -> f64 {
    body();
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        let mut calls = 0;
        while start.elapsed() < WINDOW || calls == 0 {
            body();
            calls += 1;
        }
        best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
    }
    best
}

fn noise(index: usize) -> f32 {
    ((index * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0
}
