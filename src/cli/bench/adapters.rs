//! The adapters of a benchmark: folders that exist, and some that are made for it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;

use crate::adapters::{AdapterRegistry, AdapterVersion, LoraAdapter, LoraConfig};
use crate::model::Decoder;
use crate::ops::lora_dtype::LoraDtype;

/// Largest value of a B that is made: so large that none of it is rounded to zero, and so small that the
/// answers stay those of the base or nearly so.
const MAX_B: f32 = 1e-3;

/// Adapters that are made, on all projections.
#[derive(Clone, Copy)]
pub(super) struct Made<'a> {
    pub(super) count: usize,
    pub(super) rank: usize,
    pub(super) variant: &'a str,
}

/// Loads `folders`, then makes adapters as training would leave them: of numbers that have all the bits of an
/// f32, so that `dtype` decides what they cost.
///
/// # Errors
/// A folder that is no adapter of this base; a variant that does not exist; a temporary folder that cannot be
/// written.
pub(super) fn open(
    decoder: &Arc<Decoder>,
    folders: &[PathBuf],
    made: Made<'_>,
    dtype: LoraDtype,
) -> anyhow::Result<Vec<Arc<AdapterVersion>>> {
    let registry =
        AdapterRegistry::new(decoder.config().clone()).with_base(decoder).with_dtype(dtype);
    let mut adapters = Vec::new();
    for (index, dir) in folders.iter().enumerate() {
        let (version, _) = registry
            .load(&format!("adapter-{index}"), dir, false)
            .with_context(|| format!("--adapter {}", dir.display()))?;
        adapters.push(version);
    }
    let dir = std::env::temp_dir().join(format!("tunesmith-bench-{}", std::process::id()));
    for index in 0..made.count {
        let version = make(&registry, decoder, index, made, &dir);
        // Whatever happened, nothing is left behind; what cannot be removed is the system's to clean.
        let _ = fs::remove_dir_all(&dir);
        adapters.push(version.with_context(|| format!("an adapter in {}", dir.display()))?);
    }
    Ok(adapters)
}

fn make(
    registry: &AdapterRegistry,
    decoder: &Decoder,
    index: usize,
    Made { rank, variant, .. }: Made<'_>,
    dir: &Path,
) -> anyhow::Result<Arc<AdapterVersion>> {
    let alpha = 2.0 * rank as f64;
    let variant = variant.to_owned();
    let config = LoraConfig { rank, alpha, variant, ..LoraConfig::default() };
    let adapter = LoraAdapter::fresh_on(&config, decoder, index as u64)?;
    // A fresh B is zero, which any form of numbers holds.
    adapter.randomize(MAX_B, index as u64)?;
    fs::create_dir_all(dir)?;
    adapter.write(dir, "base")?;
    Ok(registry.load(&format!("made-{index}"), dir, false)?.0)
}
