//! The adapters of a benchmark: folders that exist, and fresh ones.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;

use crate::adapters::{AdapterRegistry, AdapterVersion, LoraAdapter, LoraConfig};
use crate::model::Decoder;

/// Loads `folders`, then makes `num_fresh` adapters of `rank` on all projections. These change nothing, since
/// their B is 0, and cost what trained ones cost.
///
/// # Errors
/// A folder that is no adapter of this base; a temporary folder that cannot be written.
pub(super) fn open(
    decoder: &Arc<Decoder>,
    folders: &[PathBuf],
    num_fresh: usize,
    rank: usize,
) -> anyhow::Result<Vec<Arc<AdapterVersion>>> {
    let registry = AdapterRegistry::new(decoder.config().clone()).with_base(decoder);
    let mut adapters = Vec::new();
    for (index, dir) in folders.iter().enumerate() {
        let (version, _) = registry
            .load(&format!("adapter-{index}"), dir, false)
            .with_context(|| format!("--adapter {}", dir.display()))?;
        adapters.push(version);
    }
    let dir = std::env::temp_dir().join(format!("tunesmith-bench-{}", std::process::id()));
    for index in 0..num_fresh {
        let made = fresh(&registry, decoder, index, rank, &dir);
        // Whatever happened, nothing is left behind; what cannot be removed is the system's to clean.
        let _ = fs::remove_dir_all(&dir);
        adapters.push(made.with_context(|| format!("a fresh adapter in {}", dir.display()))?);
    }
    Ok(adapters)
}

fn fresh(
    registry: &AdapterRegistry,
    decoder: &Decoder,
    index: usize,
    rank: usize,
    dir: &Path,
) -> anyhow::Result<Arc<AdapterVersion>> {
    let config = LoraConfig { rank, alpha: 2.0 * rank as f64, ..LoraConfig::default() };
    let adapter = LoraAdapter::fresh(&config, decoder.config(), index as u64)?;
    fs::create_dir_all(dir)?;
    adapter.write(dir, "base")?;
    Ok(registry.load(&format!("fresh-{index}"), dir, false)?.0)
}
