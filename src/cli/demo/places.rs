//! Where the bundled model and data are, and where the demo writes.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::train::TrainConfig;

/// The bundled base model's folder, and so its name when served.
pub(super) const BASE: &str = "tiny-kitchen";
/// The bundled data's folder.
const DATA: &str = "recipe-assistant";

/// Paths of a demo.
pub(super) struct Places {
    /// The base model.
    pub(super) base: PathBuf,
    pub(super) train: PathBuf,
    pub(super) valid: PathBuf,
    pub(super) test: PathBuf,
    /// The training settings that suit the data.
    pub(super) recipe: PathBuf,
    /// What the demo writes into.
    pub(super) output: PathBuf,
    /// The adapter in it.
    pub(super) adapter: PathBuf,
}

impl Places {
    /// Looks for the bundled folder: `given`, else `models` here, beside the program, and where it
    /// was built.
    ///
    /// # Errors
    /// No such folder; the message lists where it was looked for.
    pub(super) fn find(given: Option<&Path>, output: &Path) -> anyhow::Result<Self> {
        let candidates = match given {
            Some(dir) => vec![dir.to_owned()],
            None => {
                let program = std::env::current_exe().unwrap_or_default();
                let beside = program.parent().map(|dir| dir.join("models"));
                let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
                [Some(PathBuf::from("models")), beside, Some(built)].into_iter().flatten().collect()
            }
        };
        let is_complete = |dir: &&PathBuf| {
            dir.join(BASE).is_dir() && dir.join(DATA).join("train.jsonl").is_file()
        };
        let Some(models) = candidates.iter().find(is_complete) else {
            let looked: Vec<String> =
                candidates.iter().map(|dir| dir.display().to_string()).collect();
            bail!(
                "no folder with {BASE} and {DATA}; looked for it at {}; name it with --models-dir",
                looked.join(", ")
            );
        };
        let data = models.join(DATA);
        Ok(Self {
            base: models.join(BASE),
            train: data.join("train.jsonl"),
            valid: data.join("valid.jsonl"),
            test: data.join("test.jsonl"),
            recipe: data.join("train.yaml"),
            output: output.to_owned(),
            adapter: output.join("adapter"),
        })
    }

    /// The settings of [`Places::recipe`].
    ///
    /// # Errors
    /// A file that cannot be read or has an unknown key.
    pub(super) fn recipe(&self) -> anyhow::Result<TrainConfig> {
        let place = || self.recipe.display().to_string();
        let text = std::fs::read_to_string(&self.recipe).with_context(place)?;
        serde_saphyr::from_str(&text).with_context(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_bundle_is_reported_with_where_it_was_looked_for() {
        let given = Path::new("/no/such/models");
        let error = Places::find(Some(given), Path::new("out")).err().unwrap().to_string();
        assert!(error.contains("/no/such/models") && error.contains("--models-dir"), "{error}");
    }
}
