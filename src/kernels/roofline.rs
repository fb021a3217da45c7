//! What this machine does at best: bytes that it reads from memory, and multiplications and additions in
//! registers. No kernel can be faster, so each says how far it is from here.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use rayon::prelude::*;

/// Read in turn, so that it does not come from a cache.
const READ_BYTES: usize = 512 << 20;
/// The best of the runs in so much time is taken: on a shared machine, the others measure the neighbours.
const WINDOW: Duration = Duration::from_millis(150);
const TURNS: usize = 20_000;
/// The best of so many runs says how much faster bf16 is.
const GAIN_RUNS: usize = 10;

/// Limits of the machine with the threads of the pool.
#[derive(Debug, Clone, Copy)]
pub struct Roofline {
    /// Bytes a second read from memory.
    pub bytes_per_second: f64,
    /// Multiplications and additions of f32 a second, in fused instructions.
    pub f32_per_second: f64,
    /// Those of bf16 whose sums are f32; as f32 where the CPU has no instruction for them.
    pub bf16_per_second: f64,
    /// Those of 8-bit integers; as f32 where the CPU has no instruction for them.
    pub int8_per_second: f64,
}

impl Roofline {
    /// Measures for about half a second, with all threads of the pool; holds half a gigabyte meanwhile.
    #[must_use]
    pub fn measure() -> Self {
        let f32_per_second = per_second(f32_loop);
        let of = |run: fn(usize) -> Option<usize>| {
            run(1).map_or(f32_per_second, |_| per_second(|turns| run(turns).unwrap_or(0)))
        };
        Self {
            bytes_per_second: read_bandwidth(),
            f32_per_second,
            bf16_per_second: of(bf16_loop),
            int8_per_second: of(int8_loop),
        }
    }

    /// How many times as fast as f32 this thread multiplies bf16, measured in a few milliseconds. `None` where
    /// the CPU has no instruction for it.
    #[must_use]
    pub fn bf16_gain() -> Option<f64> {
        bf16_loop(1)?;
        let rate = |run: &dyn Fn(usize) -> usize| {
            let once = || {
                let start = Instant::now();
                run(black_box(TURNS)) as f64 / start.elapsed().as_secs_f64()
            };
            (0..GAIN_RUNS).map(|_| once()).fold(0.0, f64::max)
        };
        Some(rate(&|turns| bf16_loop(turns).unwrap_or(0)) / rate(&f32_loop))
    }
}

fn read_bandwidth() -> f64 {
    let data = vec![1_u64; READ_BYTES / size_of::<u64>()];
    let seconds = best_seconds(|| {
        let sums = data.par_chunks(1 << 20).with_max_len(1);
        black_box(sums.map(|chunk| chunk.iter().fold(0_u64, |a, b| a.wrapping_add(*b))).max());
    });
    READ_BYTES as f64 / seconds
}

/// Operations a second of all threads, where `run` returns how many one did.
fn per_second(run: impl Fn(usize) -> usize + Sync) -> f64 {
    let threads = rayon::current_num_threads();
    let mut each = 0;
    let seconds = best_seconds(|| {
        let runs = (0..threads).into_par_iter().with_max_len(1);
        each = runs.map(|_| run(black_box(TURNS))).max().unwrap_or(0);
    });
    (threads * each) as f64 / seconds
}

fn best_seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed() < WINDOW {
        let once = Instant::now();
        run();
        best = best.min(once.elapsed().as_secs_f64());
    }
    best
}

fn f32_loop(turns: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the feature.
            return unsafe { avx512_loop(turns) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has the features.
            return unsafe { avx2_loop(turns) };
        }
    }
    let mut sums = [0.5_f32; 32];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = *sum * 0.999 + 0.001);
    }
    black_box(sums);
    turns * 32 * 2
}

/// `None` where the CPU has no instruction for it.
#[cfg_attr(not(target_arch = "x86_64"), allow(clippy::missing_const_for_fn, unused_variables))]
fn int8_loop(turns: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the CPU has the features.
        return Some(unsafe { vnni_loop(turns) });
    }
    None
}

/// `None` where the CPU has no instruction for it.
#[cfg_attr(not(target_arch = "x86_64"), allow(clippy::missing_const_for_fn, unused_variables))]
fn bf16_loop(turns: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the CPU has the features.
        return Some(unsafe { dot_loop(turns) });
    }
    None
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_loop(turns: usize) -> usize {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_set1_ps,
    };
    // SAFETY: both types are 512 bits.
    let pairs = |bits: i32| unsafe {
        std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(bits)))
    };
    let (a, b) = (pairs(0x3F00_3F00), pairs(0x3E80_3E80));
    let mut sums = [_mm512_set1_ps(0.001); 20];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, a, b));
    }
    black_box(sums);
    turns * 20 * 32 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512_loop(turns: usize) -> usize {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let (factor, term) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
    let mut sums = [term; 20];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, factor, term));
    }
    black_box(sums);
    turns * 20 * 16 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni_loop(turns: usize) -> usize {
    use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi32};
    let (a, b) = (_mm512_set1_epi32(black_box(0x0102_0304)), _mm512_set1_epi32(black_box(0x0101)));
    let mut sums = [a; 20];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, a, b));
    }
    black_box(sums);
    turns * 20 * 64 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2_loop(turns: usize) -> usize {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let (factor, term) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
    let mut sums = [term; 12];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, factor, term));
    }
    black_box(sums);
    turns * 12 * 8 * 2
}
