//! What a model's name stands for, and how a model that a job made is loaded and removed.

use std::{fs, sync::Arc};

use super::{
    Alias, Checkpoint, Job, JobsError, ModelRecord, Order, Page, Query, Service, StoreError,
    Transaction,
};
use crate::adapters::{AdapterError, AdapterVersion};
use crate::publish::sha256_hex;
use crate::telemetry;

/// Hex digits in Azure's form of a model's name.
const AZURE_DIGITS: usize = 32;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// The base model.
    Base,
    /// A model or checkpoint that a job made, loaded or not.
    Tuned(ModelRecord),
    /// An adapter that came from elsewhere, by its name in the registry. Where an alias points at it,
    /// it may be gone.
    Adapter(String),
}

impl Model {
    /// The id under which it is known, whatever it was called.
    #[must_use]
    pub fn id<'a>(&'a self, base: &'a str) -> &'a str {
        match self {
            Self::Base => base,
            Self::Tuned(record) => &record.id,
            Self::Adapter(name) => name,
        }
    }
}

/// Azure's name for what a job made: the base's name and 32 hex digits of the job.
#[must_use]
pub fn azure_model_name(base: &str, job: &str) -> String {
    let digits = sha256_hex(&[job.as_bytes()]);
    format!("{base}.ft-{}", &digits[..AZURE_DIGITS])
}

impl Service {
    /// What `name` stands for: the base, a job's model by its id, by Azure's form of it or by its
    /// checkpoint's id, an adapter that is loaded, or an alias of one of these. `None`: nothing.
    ///
    /// # Errors
    /// The database fails.
    pub fn find_model(&self, name: &str) -> Result<Option<Model>, JobsError> {
        if let Some(found) = self.find_model_itself(name)? {
            return Ok(Some(found));
        }
        let Some(alias) = self.store.get::<Alias>(name)? else { return Ok(None) };
        let target = self.find_model_itself(&alias.model)?;
        Ok(Some(target.unwrap_or(Model::Adapter(alias.model))))
    }

    fn find_model_itself(&self, name: &str) -> Result<Option<Model>, JobsError> {
        if name == self.config.base_name {
            return Ok(Some(Model::Base));
        }
        if let Some(record) = self.store.get::<ModelRecord>(name)? {
            return Ok(Some(Model::Tuned(record)));
        }
        if let Some(record) = self.model_by_other_form(name)? {
            return Ok(Some(Model::Tuned(record)));
        }
        let loaded = self.parts.registry.get(name);
        Ok(loaded.map(|version| Model::Adapter(version.name.clone())))
    }

    /// Azure's `base.ft-HEX` with or without `:ckpt-step-N`, and the ids of checkpoints.
    fn model_by_other_form(&self, name: &str) -> Result<Option<ModelRecord>, JobsError> {
        if name.starts_with("ftckpt_") || name.starts_with("ftchkpt-") {
            let id = name.replacen("ftchkpt-", "ftckpt_", 1);
            let Some(checkpoint) = self.store.get::<Checkpoint>(&id)? else { return Ok(None) };
            return Ok(self.store.get(&checkpoint.model)?);
        }
        let Some(rest) = name.strip_prefix(&self.config.base_name) else { return Ok(None) };
        if !rest.starts_with(".ft-") {
            return Ok(None);
        }
        let (whole, step) = match name.split_once(":ckpt-step-") {
            Some((whole, step)) => (whole, Some(format!(":ckpt-step-{step}"))),
            None => (name, None),
        };
        let base = &self.config.base_name;
        let is_meant = |record: &ModelRecord| {
            azure_model_name(base, &record.job_id) == whole
                && match &step {
                    Some(step) => record.is_checkpoint && record.id.ends_with(step.as_str()),
                    None => !record.is_checkpoint,
                }
        };
        let query = Query { parent: "", after: None, limit: 1, order: Order::Descending };
        let page: Page<ModelRecord> = self.store.list(&query, is_meant)?;
        Ok(page.records.into_iter().next())
    }

    /// The weights that answer to `name`; `None` is the base. Loads them where necessary: blocking.
    ///
    /// # Errors
    /// `NotFound` (param `model`) for a name that stands for nothing, and the reason why what it stands
    /// for cannot be loaded.
    pub fn version_of(&self, name: &str) -> Result<Option<Arc<AdapterVersion>>, JobsError> {
        let not_found =
            || JobsError::NotFound { what: "model", id: name.to_owned(), param: "model" };
        match self.find_model(name)?.ok_or_else(not_found)? {
            Model::Base => Ok(None),
            Model::Tuned(record) => self.load_model(&record).map(Some),
            Model::Adapter(adapter) => {
                self.parts.registry.get(&adapter).map(Some).ok_or_else(not_found)
            }
        }
    }

    /// A job's model, from the registry or else from its folder: after a restart, models are loaded
    /// when they are first asked for.
    ///
    /// # Errors
    /// It has been deleted meanwhile, or its folder is no longer what the job made.
    pub fn load_model(&self, record: &ModelRecord) -> Result<Arc<AdapterVersion>, JobsError> {
        let registry = &self.parts.registry;
        if let Some(version) = registry.get(&record.id) {
            return Ok(version);
        }
        let started = std::time::Instant::now();
        // With `replace`, somebody who was faster is no error.
        let (version, is_new) =
            registry.load(&record.id, &self.path(&record.path), true).inspect_err(|error| {
                telemetry::adapter_load_failed(error.reason());
                tracing::warn!(model = record.id, "fine-tuned model refused: {error}");
            })?;
        if version.adapter.digest() != record.digest {
            registry.unload(&record.id);
            let path = self.path(&record.path);
            let source = std::io::Error::other("the files are not those that the job published");
            return Err(AdapterError::Io { path, source }.into());
        }
        // A deletion may have come between the look at the record and the load.
        if self.store.get::<ModelRecord>(&record.id)?.is_none() {
            registry.unload(&record.id);
            let id = record.id.clone();
            return Err(JobsError::NotFound { what: "model", id, param: "model" });
        }
        if is_new {
            telemetry::adapter_loaded(started.elapsed().as_secs_f64());
            tracing::info!(model = record.id, "fine-tuned model loaded");
        }
        Ok(version)
    }

    /// The models that jobs made, oldest first, with the checkpoints among them.
    ///
    /// # Errors
    /// The database fails.
    pub fn models(&self) -> Result<Vec<ModelRecord>, JobsError> {
        Ok(self.store.all("")?)
    }

    /// Takes a job's model away: from the database, then from the registry and the disk. Requests that
    /// run on it finish. Its folder stays as long as another record names it.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where an alias points at it or an unfinished job starts from it.
    pub fn delete_model(&self, id: &str) -> Result<(), JobsError> {
        let (record, is_last) = self.store.write(|tx| {
            let not_found =
                || JobsError::NotFound { what: "model", id: id.to_owned(), param: "model" };
            let record = tx.get::<ModelRecord>(id)?.ok_or_else(not_found)?;
            if let Some(message) = tx.need_of(&record)? {
                return Err(JobsError::Conflict(message));
            }
            tx.delete::<ModelRecord>(id)?;
            if record.is_checkpoint {
                for checkpoint in tx.all::<Checkpoint>(&record.job_id)? {
                    if checkpoint.model == id {
                        tx.delete::<Checkpoint>(&checkpoint.id)?;
                    }
                }
            }
            let others = tx.all::<ModelRecord>("")?;
            let is_last = others.iter().all(|other| other.path != record.path);
            // Within the transaction, so that no alias is put on it between the two. Should the commit
            // fail, the next request loads it again.
            self.parts.registry.unload(id);
            Ok::<_, JobsError>((record, is_last))
        })?;
        tracing::info!(model = id, "fine-tuned model deleted");
        if is_last {
            self.remove_model_dir(&record.path);
        }
        Ok(())
    }

    /// Removes what a crash between a deletion's commit and its end has left: folders of ended jobs'
    /// models that no record names. A worker that runs once.
    pub(super) fn sweep_models(&self) {
        if let Err(error) = self.sweep_models_of_ended_jobs() {
            tracing::warn!("leftover models could not be removed: {error}");
        }
    }

    fn sweep_models_of_ended_jobs(&self) -> Result<(), JobsError> {
        let jobs: Vec<Job> = self.store.all("")?;
        // Asked after the jobs: an ended job's records are there.
        let named: Vec<String> = self.models()?.into_iter().map(|record| record.path).collect();
        for job in jobs.iter().filter(|job| job.status.is_final()) {
            let epochs = fs::read_dir(self.job_dir(&job.id).join("epochs"));
            let steps = epochs.into_iter().flatten().flatten().map(|entry| entry.file_name());
            let mut dirs = vec![format!("jobs/{}/model", job.id)];
            for step in steps {
                dirs.push(format!("jobs/{}/epochs/{}", job.id, step.to_string_lossy()));
            }
            for dir in dirs {
                if !named.contains(&dir) && self.path(&dir).is_dir() {
                    self.remove_model_dir(&dir);
                }
            }
        }
        Ok(())
    }

    /// A folder that cannot be removed costs room and nothing else; the next start tries again.
    pub(super) fn remove_model_dir(&self, relative: &str) {
        let path = self.path(relative);
        if let Err(error) = fs::remove_dir_all(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {error}", path.display());
        }
    }
}

impl Transaction<'_> {
    /// What would miss the model if it were gone, in words: an alias, or an unfinished job.
    pub(super) fn need_of(&self, record: &ModelRecord) -> Result<Option<String>, StoreError> {
        let id = &record.id;
        let aliases = self.all::<Alias>("")?;
        if let Some(alias) = aliases.iter().find(|alias| alias.model == *id) {
            let name = &alias.name;
            return Ok(Some(format!(
                "the model `{id}` is deployed as `{name}`; delete that deployment or point it \
                 elsewhere first"
            )));
        }
        let child = unfinished_child(self, id)?;
        Ok(child.map(|job| format!("the model `{id}` is what the job {job} starts from")))
    }
}

fn unfinished_child(tx: &Transaction<'_>, model: &str) -> Result<Option<String>, StoreError> {
    let query = Query { parent: "", after: None, limit: 1, order: Order::Descending };
    let is_child = |job: &Job| !job.status.is_final() && job.parent_model.as_deref() == Some(model);
    let page: Page<Job> = tx.list(&query, is_child)?;
    Ok(page.records.into_iter().next().map(|job| job.id))
}
