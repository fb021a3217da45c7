//! LoRA: each adapted projection adds `scale * (x A^T) B^T` to its output.

use std::{collections::BTreeMap, ops::Range};

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    AdapterError,
    digest::digest,
    site::{Matrix, tensor_name},
};
use crate::model::{Delta, Dropout, ModelConfig, ModelError, Projection, Site};
use crate::ops::{
    dropout::dropout,
    lora::{self, LoraPart},
};

/// What a fresh adapter looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rows of A and columns of B, above 0.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability with which an element of a projection's input is dropped, in [0, 1).
    pub dropout: f64,
    /// The adapted projections, in all layers.
    pub targets: Vec<Projection>,
    /// Scale `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
}

/// A LoRA adapter over a base: `y += scale * (x A^T) B^T` per site.
///
/// ```
/// use tunesmith::adapters::{LoraAdapter, LoraConfig};
/// use tunesmith::model::{ModelConfig, Projection};
///
/// let model = ModelConfig::from_dir("tests/fixtures/tiny-llama".as_ref())?;
/// let targets = vec![Projection::Q, Projection::V];
/// let config = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.0, targets, use_rslora: false };
/// let adapter = LoraAdapter::fresh(&config, &model, 42)?;
/// assert_eq!(adapter.variables().len(), 2 * 2 * 2); // layers, projections, A and B
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LoraAdapter {
    modules: BTreeMap<Site, LoraModule>,
    /// The modules packed for serving; empty where they are trained.
    parts: BTreeMap<Site, LoraPart>,
    /// By PEFT name, sorted; the same storage as the tensors in `modules`.
    variables: Vec<(String, Var)>,
    digest: String,
    pub(super) dropout: f64,
    pub(super) use_rslora: bool,
    pub(super) num_layers: usize,
}

/// One projection's part of an adapter.
#[derive(Debug, Clone)]
pub struct LoraModule {
    /// `[r, in]` f32
    pub a: Tensor,
    /// `[out, r]` f32
    pub b: Tensor,
    /// What the product is multiplied by: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub scale: f64,
    /// Alpha as configured.
    pub alpha: f64,
}

/// Everything about an adapter but what follows from it.
pub(super) struct LoraParts {
    /// A `[r, in]`, B `[out, r]` and alpha per site.
    pub(super) matrices: BTreeMap<Site, (Tensor, Tensor, f64)>,
    pub(super) dropout: f64,
    pub(super) use_rslora: bool,
    pub(super) num_layers: usize,
    pub(super) trainable: bool,
}

impl LoraAdapter {
    /// A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, f32 variables, reproducible from `seed`. A module's A
    /// depends on the seed and its place only, not on which other modules are adapted.
    ///
    /// # Errors
    /// `InvalidSetting`; `Candle` if memory cannot be had.
    pub fn fresh(
        config: &LoraConfig,
        model: &ModelConfig,
        seed: u64,
    ) -> Result<Self, AdapterError> {
        config.check()?;
        let mut matrices = BTreeMap::new();
        for layer in 0..model.num_layers {
            for projection in &config.targets {
                let site = Site { layer, projection: *projection };
                let (inputs, outputs) = model.projection_shape(*projection);
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(site_number(site));
                let bound = 1.0 / (inputs as f32).sqrt();
                let values: Vec<f32> = (0..config.rank * inputs)
                    .map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound)
                    .collect();
                let a = Tensor::from_vec(values, (config.rank, inputs), &Device::Cpu)?;
                let zeros = vec![0.0_f32; outputs * config.rank];
                let b = Tensor::from_vec(zeros, (outputs, config.rank), &Device::Cpu)?;
                matrices.insert(site, (a, b, config.alpha));
            }
        }
        Self::from_parts(LoraParts {
            matrices,
            dropout: config.dropout,
            use_rslora: config.use_rslora,
            num_layers: model.num_layers,
            trainable: true,
        })
    }

    /// A and B by PEFT name, sorted; empty unless trainable.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    /// A, B, scale per site.
    #[must_use]
    pub fn modules(&self) -> &BTreeMap<Site, LoraModule> {
        &self.modules
    }

    /// SHA-256 over scales and tensors in name order, hex: two adapters with one digest compute the
    /// same. That of the moment when the adapter was made or read; training does not move it.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Bytes of all A and B in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.num_parameters() * size_of::<f32>()
    }

    /// Elements of all A and B.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.modules.values().map(|module| module.a.elem_count() + module.b.elem_count()).sum()
    }

    /// Largest rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.modules.values().map(LoraModule::rank).max().unwrap_or(0)
    }

    pub(super) fn from_parts(parts: LoraParts) -> Result<Self, AdapterError> {
        let mut modules = BTreeMap::new();
        let mut served = BTreeMap::new();
        let mut variables = Vec::new();
        for (site, (mut a, mut b, alpha)) in parts.matrices {
            if parts.trainable {
                for (matrix, tensor) in [(Matrix::A, &mut a), (Matrix::B, &mut b)] {
                    let variable = Var::from_tensor(tensor)?;
                    *tensor = variable.as_tensor().clone();
                    variables.push((tensor_name(site, matrix), variable));
                }
            }
            let rank = a.dim(0)? as f64;
            let scale = alpha / if parts.use_rslora { rank.sqrt() } else { rank };
            if !parts.trainable {
                served.insert(site, LoraPart::new(&a, &b, scale)?);
            }
            modules.insert(site, LoraModule { a, b, scale, alpha });
        }
        variables.sort_by(|(left, _), (right, _)| left.cmp(right));
        let digest = digest(&modules)?;
        let LoraParts { dropout, use_rslora, num_layers, .. } = parts;
        Ok(Self { modules, parts: served, variables, digest, dropout, use_rslora, num_layers })
    }
}

impl LoraModule {
    /// Rows of A.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }
}

impl Delta for LoraAdapter {
    fn apply(
        &self,
        site: Site,
        input: &Tensor,
        output: Tensor,
        rows: Range<usize>,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, ModelError> {
        let Some(module) = self.modules.get(&site) else { return Ok(output) };
        let LoraModule { a, b, scale, .. } = module;
        if let Some(part) = self.parts.get(&site)
            && !input.track_op()
            && !output.track_op()
        {
            lora::add_in_place(&output, input, vec![(rows, part.clone())])?;
            return Ok(output);
        }
        let mut x = input.narrow(0, rows.start, rows.len())?; // [rows, in]
        if let Some(Dropout { probability, seed, .. }) = dropout
            && probability > 0.0
        {
            x = self::dropout(&x, probability, site_seed(seed, site))?;
        }
        let delta = lora::lora(&x, a, b, *scale)?; // [rows, out]
        Ok(add_rows(&output, &delta, rows)?)
    }

    fn part(&self, site: Site) -> Option<&LoraPart> {
        self.parts.get(&site)
    }

    fn is_frozen(&self) -> bool {
        self.variables.is_empty()
    }
}

impl LoraConfig {
    fn check(&self) -> Result<(), AdapterError> {
        let wrong =
            |field, value, expected| Err(AdapterError::InvalidSetting { field, value, expected });
        if self.rank == 0 {
            return wrong("rank", self.rank.to_string(), "above 0");
        }
        if !self.alpha.is_finite() {
            return wrong("alpha", self.alpha.to_string(), "a finite number");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("dropout", self.dropout.to_string(), "at least 0 and below 1");
        }
        if self.targets.is_empty() {
            return wrong("targets", "[]".to_owned(), "at least one projection");
        }
        Ok(())
    }
}

/// `output` with `delta` added on `rows`; both bodies keep the graph.
fn add_rows(output: &Tensor, delta: &Tensor, rows: Range<usize>) -> candle_core::Result<Tensor> {
    let num_rows = output.dim(0)?;
    if rows == (0..num_rows) {
        return output + delta;
    }
    let middle = (output.narrow(0, rows.start, rows.len())? + delta)?;
    let mut parts = Vec::new();
    if rows.start > 0 {
        parts.push(output.narrow(0, 0, rows.start)?);
    }
    parts.push(middle);
    if rows.end < num_rows {
        parts.push(output.narrow(0, rows.end, num_rows - rows.end)?);
    }
    Tensor::cat(&parts, 0)
}

fn site_number(site: Site) -> u64 {
    (site.layer * Projection::ALL.len() + site.projection as usize) as u64
}

/// A seed for one site, so that no two sites share a mask (the finalizer of SplitMix64).
fn site_seed(seed: u64, site: Site) -> u64 {
    let mut z = seed.wrapping_add((site_number(site) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
