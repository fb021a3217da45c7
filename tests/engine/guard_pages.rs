//! Every kernel between guard pages: it reads and writes nothing beside its buffers, whatever the shape.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use crate::{KV_FORMS, WEIGHT_FORMS};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::kernels::{
    AttentionBackward, AttentionForward, AttentionShape, KvForm, KvPanel, KvPanelMut, KvPanels,
    KvSide, LANES, LoraOutput, LoraSegment, MatmulJob, PackedWeight, QuerySpan, RmsNormGradient,
    WeightForm, add_lora, add_loras, all,
};

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// A buffer between two pages that must not be touched.
struct Guarded<T> {
    pages: *mut libc::c_void,
    length: usize,
    values: *mut T,
    count: usize,
}

impl<T: Copy> Guarded<T> {
    /// `values`, with the last one (or else the first one) right beside a guard page.
    #[allow(unsafe_code, reason = "memory with a guard cannot be had otherwise")]
    fn new(values: &[T], at_end: bool) -> Self {
        const PAGE: usize = 4096;
        let bytes = std::mem::size_of_val(values);
        let inner = bytes.next_multiple_of(PAGE);
        let length = inner + 2 * PAGE;
        let at = PAGE + if at_end { inner - bytes } else { 0 };
        // SAFETY: a fresh private mapping of `length` bytes; the middle of it is made writable and holds
        // `values.len()` elements at `at`, a multiple of their size.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let pages = libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(pages, libc::MAP_FAILED);
            let middle = pages.byte_add(PAGE);
            assert_eq!(libc::mprotect(middle, inner, libc::PROT_READ | libc::PROT_WRITE), 0);
            let to = pages.byte_add(at).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
            Self { pages, length, values: to, count: values.len() }
        }
    }

    #[allow(unsafe_code, reason = "as above")]
    fn slice(&mut self) -> &mut [T] {
        // SAFETY: `new` put `count` elements there; the borrow is that of `self`.
        unsafe { std::slice::from_raw_parts_mut(self.values, self.count) }
    }
}

impl<T> Drop for Guarded<T> {
    #[allow(unsafe_code, reason = "as above")]
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, used by nobody any more.
        assert_eq!(unsafe { libc::munmap(self.pages, self.length) }, 0);
    }
}

#[test]
fn products_touch_nothing_beside_their_buffers() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for (rows, k, n) in
        [(1, 1, 1), (2, 33, 17), (7, 64, 50), (8, 515, 16), (13, 47, 33), (29, 97, 130)]
    {
        let (x, w) = (random(&mut rng, rows * k), random(&mut rng, n * k));
        let (bias, y) = (random(&mut rng, n), random(&mut rng, rows * n));
        for at_end in [false, true] {
            let [mut x, mut w, mut bias, mut y] =
                [&x, &w, &bias, &y].map(|values| Guarded::new(values, at_end));
            let mut dx = Guarded::new(&vec![0.0; rows * k], at_end);
            let mut factors = Guarded::new(&random(&mut rng, n), at_end);
            for table in all() {
                for form in WEIGHT_FORMS {
                    let weight = PackedWeight::from_f32(form, w.slice(), k);
                    weight.linear(table, x.slice(), Some(bias.slice()), y.slice());
                    weight.input_gradient(table, y.slice(), dx.slice());
                }
                let a = PackedWeight::from_f32(WeightForm::F32, w.slice(), k);
                let b = PackedWeight::from_f32(WeightForm::Bf16, &vec![0.5; n * n], n);
                let segment =
                    LoraSegment { rows: 0..rows, a: &a, b: &b, scale: 1.0, factors: None };
                add_lora(table, x.slice(), std::slice::from_ref(&segment), (k, n), y.slice());
                let segments = vec![LoraSegment { factors: Some(factors.slice()), ..segment }];
                let (out, bias) = (y.slice(), Some(&*bias.slice()));
                let mut outputs = [LoraOutput { out, out_features: n, bias, segments }];
                add_loras(table, x.slice(), k, &mut outputs);
                tunesmith::kernels::linear(table, x.slice(), w.slice(), k, y.slice());
                tunesmith::kernels::input_gradient(table, y.slice(), w.slice(), k, dx.slice());
                let (a_strides, shape) = ((k, 1), (rows, k, 1));
                let job = MatmulJob {
                    a: x.slice(),
                    a_strides,
                    b: w.slice(),
                    shape,
                    alpha: 1.0,
                    accumulate: false,
                };
                let mut out = Guarded::new(&vec![0.0; rows], at_end);
                job.run(table, out.slice());
            }
        }
    }
}

#[test]
fn rows_touch_nothing_beside_their_buffers() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    for size in [1, 7, 15, 16, 17, 31, 33, 64, 97, 1023] {
        for at_end in [false, true] {
            let mut buffer = || Guarded::new(&random(&mut rng, size), at_end);
            let [mut x, mut w, mut grad] = [(); 3].map(|()| buffer());
            let [mut out, mut grad_a, mut grad_b] = [(); 3].map(|()| buffer());
            for table in all() {
                table.rms_norm(x.slice(), w.slice(), 1e-5, out.slice());
                table.rms_norm_backward(RmsNormGradient {
                    x: x.slice(),
                    weight: w.slice(),
                    grad_out: grad.slice(),
                    eps: 1e-5,
                    grad_x: grad_a.slice(),
                    grad_weight: Some(grad_b.slice()),
                });
                table.silu_mul(x.slice(), w.slice(), out.slice());
                let to = (grad_a.slice(), grad_b.slice());
                table.silu_mul_backward((x.slice(), w.slice()), grad.slice(), to);
                table.gelu_mul(x.slice(), w.slice(), out.slice());
                let to = (grad_a.slice(), grad_b.slice());
                table.gelu_mul_backward((x.slice(), w.slice()), grad.slice(), to);
                table.soft_cap(out.slice(), 3.0);
                let (max, sum) = table.softmax_stats(out.slice());
                table.softmax_scaled(out.slice(), max, 1.0 / sum);
                let total: f32 = out.slice().iter().sum();
                assert!((total - 1.0).abs() < 1e-4, "{} {size}: {total}", table.name);
            }
        }
    }
}

/// Heads, key heads, head dimension, window, soft cap.
type Heads = (usize, usize, usize, Option<usize>, Option<f32>);

const ATTENTION: [Heads; 5] = [
    (1, 1, 2, None, None),
    (4, 2, 20, Some(19), None),
    (7, 1, 64, None, Some(2.0)),
    (9, 3, 16, Some(5), Some(2.0)),
    (14, 2, 34, None, None),
];

fn attention_shapes() -> impl Iterator<Item = AttentionShape> {
    ATTENTION.into_iter().map(|(heads, kv_heads, head_dim, window, soft_cap)| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: 0.3,
        window,
        soft_cap,
    })
}

/// Writes keys and values into a cache of `E` and attends to them, everything between guards.
fn attend<E: Copy>(
    (shape, form, empty): (AttentionShape, KvForm, E),
    at_end: bool,
    panel: impl Fn(&[E]) -> KvPanel<'_>,
    panel_mut: impl Fn(&mut [E]) -> KvPanelMut<'_>,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let [mut keys, mut values] = [KvSide::Keys, KvSide::Values]
        .map(|side| Guarded::new(&vec![empty; 4 * form.block_len(&shape, side)], at_end));
    for context in [1_usize, 16, 33, 64] {
        let num_blocks = context.div_ceil(LANES);
        let blocks: Vec<u32> = (0..num_blocks as u32).map(|block| 3 - block).collect();
        let slots: Vec<u32> = (0..context)
            .map(|at| blocks[at / LANES] * LANES as u32 + (at % LANES) as u32)
            .collect();
        let [mut blocks, mut slots] = [blocks, slots].map(|it| Guarded::new(&it, at_end));
        for (side, panel) in [(KvSide::Keys, &mut keys), (KvSide::Values, &mut values)] {
            let mut rows = Guarded::new(&random(&mut rng, context * narrow), at_end);
            shape.write(side, rows.slice(), slots.slice(), panel_mut(panel.slice()));
        }
        let panels = KvPanels { keys: panel(keys.slice()), values: panel(values.slice()) };
        let block_table = &*blocks.slice();
        for rows in [1, context.min(5), context] {
            let mut queries = Guarded::new(&random(&mut rng, rows * wide), at_end);
            let mut out = Guarded::new(&vec![f32::NAN; rows * wide], at_end);
            let spans = [QuerySpan { rows: 0..rows, first_position: context - rows, block_table }];
            for table in all() {
                let queries = &*queries.slice();
                AttentionForward { shape, panels, queries, spans: &spans }.run(table, out.slice());
                assert!(out.slice().iter().all(|value| value.is_finite()), "{}", table.name);
            }
        }
    }
}

#[test]
fn attention_touches_nothing_beside_its_buffers() {
    for shape in attention_shapes() {
        for at_end in [false, true] {
            for form in KV_FORMS {
                match form {
                    KvForm::F32 => {
                        attend(
                            (shape, form, 0.0),
                            at_end,
                            |it| KvPanel::F32(it),
                            |it| KvPanelMut::F32(it),
                        );
                    }
                    KvForm::Bf16 => {
                        let empty = (shape, form, bf16::ZERO);
                        attend(empty, at_end, |it| KvPanel::Bf16(it), |it| KvPanelMut::Bf16(it));
                    }
                    KvForm::Int8 => {
                        attend(
                            (shape, form, 0),
                            at_end,
                            |it| KvPanel::Int8(it),
                            |it| KvPanelMut::Int8(it),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_way_back_through_attention_touches_nothing_beside_its_buffers() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for shape in attention_shapes() {
        for (at_end, rows) in [(false, 1), (true, 1), (true, 17), (false, 40), (true, 40)] {
            let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
            let mut buffer = |width| Guarded::new(&random(&mut rng, rows * width), at_end);
            let [mut queries, mut out, mut grad_out, mut grad_q] = [wide; 4].map(&mut buffer);
            let [mut keys, mut values, mut grad_k, mut grad_v] = [narrow; 4].map(&mut buffer);
            let cuts = if rows > 3 { vec![0, 3, rows] } else { vec![0, rows] };
            let sequences: Vec<_> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
            for table in all() {
                AttentionBackward {
                    shape,
                    queries: queries.slice(),
                    keys: keys.slice(),
                    values: values.slice(),
                    out: out.slice(),
                    grad_out: grad_out.slice(),
                    sequences: &sequences,
                }
                .run(table, (grad_q.slice(), grad_k.slice(), grad_v.slice()));
            }
        }
    }
}
