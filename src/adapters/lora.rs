//! An adapter: what it has at each projection and in place of the tables, and how it takes part in the
//! forward pass.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    AdapterError, LoraConfig, LoraModule,
    digest::digest,
    dora,
    module::RawModule,
    plan::Planned,
    tables::{self, Shares, Tables},
    variant::{self, Contribution, VARIANTS, Variant},
};
use crate::model::{
    Decoder, Delta, Dropout, ModelConfig, ModelError, OwnTable, Projected, Projection, Site, Table,
};
use crate::ops::{
    adapted_linear::TrainedLora, dropout::dropout, lora::LoraPart, lora_dtype::LoraDtype,
    weight::Weight,
};
use crate::publish::sha256_hex;

/// A LoRA adapter over a base: low-rank modules per site, and tables of its own.
///
/// ```
/// use tunesmith::adapters::{LoraAdapter, LoraConfig};
/// use tunesmith::model::{ModelConfig, Projection};
///
/// let model = ModelConfig::from_dir("tests/fixtures/tiny-llama".as_ref())?;
/// let targets = vec![Projection::Q, Projection::V];
/// let config = LoraConfig { rank: 4, alpha: 8.0, targets, ..LoraConfig::default() };
/// let adapter = LoraAdapter::fresh(&config, &model, 42)?;
/// assert_eq!(adapter.variables().len(), 2 * 2 * 2); // layers, projections, A and B
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LoraAdapter {
    modules: BTreeMap<Site, LoraModule>,
    tables: Tables,
    /// By PEFT name, sorted; the same storage as the tensors in `modules` and `tables`.
    variables: Vec<(String, Var)>,
    digest: String,
    dtype: LoraDtype,
    pub(super) variant: &'static Variant,
    pub(super) dropout: f64,
    pub(super) use_rslora: bool,
    pub(super) num_layers: usize,
}

/// Everything about an adapter but what follows from it.
pub(super) struct LoraParts {
    pub(super) modules: BTreeMap<Site, RawModule>,
    pub(super) variant: &'static Variant,
    /// What there is of tables, and their tensors by name.
    pub(super) tables: (Shares, BTreeMap<String, Tensor>),
    pub(super) dropout: f64,
    pub(super) use_rslora: bool,
    pub(super) trainable: bool,
    /// How A and B are held, unless they are trained.
    pub(super) dtype: LoraDtype,
}

impl LoraAdapter {
    /// A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, f32 variables, reproducible from `seed`. A module's A
    /// depends on the seed and its place only, not on which other modules are adapted. For adapters
    /// that do not start from the base's weights; [`fresh_on`](Self::fresh_on) makes every kind.
    ///
    /// # Errors
    /// `InvalidSetting`, also for what starts from the base's weights, `MalformedConfig`,
    /// `UnsupportedTarget`; `Candle` if memory cannot be had.
    pub fn fresh(
        config: &LoraConfig,
        model: &ModelConfig,
        seed: u64,
    ) -> Result<Self, AdapterError> {
        Self::fresh_over(config, model, None, seed)
    }

    /// [`fresh`](Self::fresh) over a base: DoRA's magnitudes, whole tables and rows of tokens start as
    /// they are there.
    ///
    /// # Errors
    /// As [`fresh`](Self::fresh).
    pub fn fresh_on(
        config: &LoraConfig,
        decoder: &Decoder,
        seed: u64,
    ) -> Result<Self, AdapterError> {
        Self::fresh_over(config, decoder.config(), Some(decoder), seed)
    }

    fn fresh_over(
        config: &LoraConfig,
        model: &ModelConfig,
        base: Option<&Decoder>,
        seed: u64,
    ) -> Result<Self, AdapterError> {
        let planned = config.plan(model)?;
        let variant = variant::find(&config.variant).unwrap_or(&VARIANTS[0]);
        let shares = tables::wanted(config, model)?;
        let needs_base = |field, value: &str| AdapterError::InvalidSetting {
            field,
            value: value.to_owned(),
            expected: "nothing that starts from the base's weights, which are not there",
        };
        let mut modules = BTreeMap::new();
        for Planned { site, rank, alpha } in planned {
            let (inputs, outputs) = model.projection_shape(site.projection);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(site_number(site));
            let bound = 1.0 / (inputs as f32).sqrt();
            let values: Vec<f32> =
                (0..rank * inputs).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound).collect();
            let a = Tensor::from_vec(values, (rank, inputs), &Device::Cpu)?;
            let b = Tensor::from_vec(vec![0.0_f32; outputs * rank], (outputs, rank), &Device::Cpu)?;
            let vector = match (variant.vector, base) {
                (None, _) => None,
                (Some(_), Some(decoder)) => (variant.start)(decoder.projection(site).0)?,
                (Some(_), None) => return Err(needs_base("variant", variant.name)),
            };
            modules.insert(site, RawModule { a, b, vector, alpha });
        }
        let tensors = match base {
            Some(decoder) => tables::start(&shares, &config.token_starts, decoder)?,
            None if shares.is_empty() => BTreeMap::new(),
            None => return Err(needs_base("modules_to_save", "set")),
        };
        let parts = LoraParts {
            modules,
            variant,
            tables: (shares, tensors),
            dropout: config.dropout,
            use_rslora: config.use_rslora,
            trainable: true,
            dtype: LoraDtype::Auto,
        };
        Self::from_parts(parts, model)
    }

    /// Gives every trained B numbers in -max..max, reproducible from `seed`: a fresh adapter becomes one that
    /// does something, as benchmarks and tests want it.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn randomize(&self, max: f32, seed: u64) -> Result<(), AdapterError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for (name, variable) in &self.variables {
            if name.ends_with("lora_B.weight") {
                let random = |_| (rng.random::<f32>() * 2.0 - 1.0) * max;
                let values: Vec<f32> = (0..variable.elem_count()).map(random).collect();
                variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu)?)?;
            }
        }
        Ok(())
    }

    /// Everything that is trained by PEFT name, sorted; empty unless trainable.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    /// What each site has.
    #[must_use]
    pub fn modules(&self) -> &BTreeMap<Site, LoraModule> {
        &self.modules
    }

    /// SHA-256 over scales and tensors in name order, hex: two adapters with one digest and one
    /// [`dtype`](Self::dtype) compute the same. That of the moment when the adapter was made or read;
    /// neither training nor rounding moves it.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// How A and B are held.
    #[must_use]
    pub fn dtype(&self) -> LoraDtype {
        self.dtype
    }

    /// What may be remembered of the adapter's effect is remembered under this: the digest, which for a
    /// rounded adapter is another one.
    #[must_use]
    pub fn served_digest(&self) -> Cow<'_, str> {
        if !self.dtype.rounds() {
            return Cow::Borrowed(&self.digest);
        }
        Cow::Owned(sha256_hex(&[self.digest.as_bytes(), self.dtype.name().as_bytes()]))
    }

    /// Bytes of all its tensors as f32.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.num_parameters() * size_of::<f32>()
    }

    /// Elements of all its tensors.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        let modules: usize = self.modules.values().map(LoraModule::num_parameters).sum();
        modules + self.tables.num_parameters()
    }

    /// Largest rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.modules.values().map(LoraModule::rank).max().unwrap_or(0)
    }

    /// Computes what follows from the base's weights, so that the first request does not wait for it.
    /// Over another base than the first it is computed in each pass.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn prepare(&self, decoder: &Decoder) -> Result<(), AdapterError> {
        if self.variant.vector.is_some() {
            for (site, module) in &self.modules {
                dora::norms(module, decoder.projection(*site).0)?;
            }
        }
        Ok(())
    }

    /// Whether it has rows of the embedding, so that its folder may have a tokenizer with more tokens.
    #[must_use]
    pub fn has_own_tokens(&self) -> bool {
        self.tables.get(Table::Embedding).is_some()
    }

    /// Whether the head is another matrix than the embedding although the base has one for both: what
    /// the merged model's configuration must say.
    #[must_use]
    pub fn unties_head(&self) -> bool {
        self.tables.unties()
    }

    pub(super) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// All tensors by their names in the file, sorted, f32, with the values of this moment.
    pub(super) fn named(&self) -> Result<BTreeMap<String, Tensor>, AdapterError> {
        let mut named: BTreeMap<String, Tensor> = self.tables.named()?.into_iter().collect();
        for (site, module) in &self.modules {
            named.extend(module.named(*site)?);
        }
        Ok(named)
    }

    pub(super) fn from_parts(parts: LoraParts, model: &ModelConfig) -> Result<Self, AdapterError> {
        let LoraParts { modules: raw, variant, tables, dropout, use_rslora, trainable, dtype } =
            parts;
        let mut modules = BTreeMap::new();
        let mut variables = Vec::new();
        let (shares, tensors) = tables;
        let variables_of_tables = trainable.then_some(&mut variables);
        let tables = Tables::new(&shares, model, tensors, variables_of_tables)?;
        let kind = (variant, use_rslora);
        let digest = digest(&raw, kind, &tables)?;
        for (site, raw) in raw {
            let module = if trainable {
                LoraModule::trained(site, &raw, kind, &mut variables)?
            } else {
                raw.check_range(site, dtype)?;
                LoraModule::frozen(raw, kind, dtype)?
            };
            modules.insert(site, module);
        }
        variables.sort_by(|(left, _), (right, _)| left.cmp(right));
        let num_layers = model.num_layers;
        let dtype = if trainable { LoraDtype::Float32 } else { dtype };
        Ok(Self {
            modules,
            tables,
            variables,
            digest,
            dtype,
            variant,
            dropout,
            use_rslora,
            num_layers,
        })
    }
}

impl Delta for LoraAdapter {
    fn apply(
        &self,
        at: &Projected<'_>,
        output: Tensor,
        rows: Range<usize>,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, ModelError> {
        let Some(module) = self.modules.get(&at.site) else { return Ok(output) };
        let mut input = at.input.narrow(0, rows.start, rows.len())?; // [rows, in]
        // Nobody trains a frozen adapter, so nothing of its input is dropped.
        let dropout = dropout.filter(|dropout| dropout.probability > 0.0 && !self.is_frozen());
        if let Some(Dropout { probability, seed, .. }) = dropout {
            input = self::dropout(&input, probability, site_seed(seed, at.site))?;
        }
        let contribution = Contribution { at, rows, input, dropped: dropout.is_some() };
        Ok((module.variant().apply)(module, &contribution, output)?)
    }

    fn part(&self, site: Site, weight: &Weight) -> Option<&LoraPart> {
        let module = self.modules.get(&site)?;
        if module.variant().is_sum { module.part() } else { dora::part(module, weight) }
    }

    fn trained(
        &self,
        site: Site,
        dropout: Option<Dropout>,
    ) -> Result<Option<TrainedLora>, ModelError> {
        let sum_in_training =
            |module: &&LoraModule| module.variant().is_sum && module.part().is_none();
        let Some(module) = self.modules.get(&site).filter(sum_in_training) else { return Ok(None) };
        let [a, b] = module.matrices()?;
        let seeded = |dropout: Dropout| (dropout.probability, site_seed(dropout.seed, site));
        Ok(Some(TrainedLora { a, b, scale: module.scale, dropout: dropout.map(seeded) }))
    }

    fn is_frozen(&self) -> bool {
        self.variables.is_empty()
    }

    fn table(&self, table: Table) -> Option<&OwnTable> {
        self.tables.get(table)
    }
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
