//! Aliases: names that stand for a model and can be moved to another one without a pause.

use serde_json::Value;

use super::{Alias, JobsError, Model, ModelRecord, Service, StoreError, Transaction, unix_seconds};

/// Longest name, in characters; Azure's limit for a deployment.
const MAX_NAME_CHARS: usize = 64;

impl Service {
    /// Points `name` at the model, all at once: a request sees the old one or the new one. Returns the
    /// alias and whether it is new.
    ///
    /// # Errors
    /// `Invalid` for a name that cannot be one (param `name`), `NotFound` for a model that is gone
    /// (param `model`).
    pub fn put_alias(
        &self,
        name: &str,
        model: &Model,
        sku: Value,
    ) -> Result<(Alias, bool), JobsError> {
        self.check_alias_name(name)?;
        let id = model.id(&self.config.base_name);
        self.store.write(|tx| {
            // Looked at within the transaction: a deletion may have come meanwhile.
            let is_there = match model {
                Model::Base => true,
                Model::Tuned(record) => tx.get::<ModelRecord>(&record.id)?.is_some(),
                Model::Adapter(adapter) => self.parts.registry.get(adapter).is_some(),
            };
            if !is_there {
                let id = id.to_owned();
                return Err(JobsError::NotFound { what: "model", id, param: "model" });
            }
            let is_new = tx.get::<Alias>(name)?.is_none();
            Ok((tx.point_alias(name, id, Some(sku))?, is_new))
        })
    }

    /// Refuses what cannot be an alias: no plain name, or already the name of a model.
    ///
    /// # Errors
    /// `Invalid` with param `name`.
    pub fn check_alias_name(&self, name: &str) -> Result<(), JobsError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let is_plain = name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(plain)
            && name.len() <= MAX_NAME_CHARS;
        if !is_plain {
            return Err(JobsError::invalid(
                "name",
                format!(
                    "{name:?} cannot be an alias: expected letters, digits and `-_.`, a letter or \
                     digit first, at most {MAX_NAME_CHARS}"
                ),
            ));
        }
        let is_taken = name == self.config.base_name
            || self.parts.registry.get(name).is_some()
            || self.store.get::<ModelRecord>(name)?.is_some();
        if is_taken {
            let message = format!("`{name}` cannot be an alias: it is the name of a model");
            return Err(JobsError::invalid("name", message));
        }
        Ok(())
    }

    /// The alias of this name.
    ///
    /// # Errors
    /// `NotFound` with param `name`.
    pub fn alias(&self, name: &str) -> Result<Alias, JobsError> {
        self.store.get(name)?.ok_or_else(|| no_alias(name))
    }

    /// All aliases, oldest first.
    ///
    /// # Errors
    /// The database fails.
    pub fn aliases(&self) -> Result<Vec<Alias>, JobsError> {
        Ok(self.store.all("")?)
    }

    /// Takes a name away; its model stays.
    ///
    /// # Errors
    /// `NotFound` with param `name`.
    pub fn delete_alias(&self, name: &str) -> Result<(), JobsError> {
        let was_there = self.store.write(|tx| tx.delete::<Alias>(name))?;
        if was_there { Ok(()) } else { Err(no_alias(name)) }
    }
}

impl Transaction<'_> {
    /// Makes the alias `name`, or moves it, to the model with this id. Without a `sku` it keeps its own.
    ///
    /// # Errors
    /// The database fails.
    pub fn point_alias(
        &self,
        name: &str,
        model: &str,
        sku: Option<Value>,
    ) -> Result<Alias, StoreError> {
        let (name, model) = (name.to_owned(), model.to_owned());
        match self.get::<Alias>(&name)? {
            Some(old) => {
                let moved = Alias { model, sku: sku.unwrap_or(old.sku), ..old };
                self.update(&moved)?;
                Ok(moved)
            }
            None => {
                let sku = sku.unwrap_or(Value::Null);
                let alias = Alias { name, model, created_at: unix_seconds(), sku };
                self.insert(&alias)?;
                Ok(alias)
            }
        }
    }
}

fn no_alias(name: &str) -> JobsError {
    JobsError::NotFound { what: "alias", id: name.to_owned(), param: "name" }
}
