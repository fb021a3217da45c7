//! How large an adapter is, before there is one.

use super::{
    AdapterError, LoraAdapter, LoraConfig,
    tables::{self, Share, shape},
    variant,
};
use crate::model::{ModelConfig, Site};

/// Sizes of an adapter, as far as memory depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterSize {
    /// Elements of all its tensors.
    pub num_parameters: usize,
    /// Ranks of all modules, summed: what `x A` has of a token.
    pub ranks: usize,
    /// Output features of the modules, summed, that are not one operation with their projection.
    pub apart: usize,
}

impl AdapterSize {
    /// Of modules of the variant named `variant` with these ranks, and `tables` elements of tables.
    fn new(
        modules: impl Iterator<Item = (Site, usize)>,
        variant: &str,
        tables: usize,
        model: &ModelConfig,
    ) -> Self {
        let variant = variant::find(variant);
        let has_vector = variant.is_some_and(|variant| variant.vector.is_some());
        let is_sum = variant.is_none_or(|variant| variant.is_sum);
        let mut size = Self { num_parameters: tables, ranks: 0, apart: 0 };
        for (site, rank) in modules {
            let (inputs, outputs) = model.projection_shape(site.projection);
            let vector = if has_vector { outputs } else { 0 };
            size.num_parameters += rank * (inputs + outputs) + vector;
            size.ranks += rank;
            size.apart += if is_sum { 0 } else { outputs };
        }
        size
    }
}

impl LoraConfig {
    /// Of the fresh adapter that this describes: patterns, chosen layers, DoRA's lengths, tables and rows of
    /// tokens included.
    ///
    /// # Errors
    /// As [`LoraAdapter::fresh_on`].
    pub fn size(&self, model: &ModelConfig) -> Result<AdapterSize, AdapterError> {
        let planned = self.plan(model)?;
        let shares = tables::wanted(self, model)?;
        let own = shares.values().filter(|share| **share != Share::Tied);
        let elements = own.map(|share| shape(share, model).iter().product::<usize>());
        let modules = planned.into_iter().map(|module| (module.site, module.rank));
        Ok(AdapterSize::new(modules, &self.variant, elements.sum(), model))
    }
}

impl LoraAdapter {
    /// Its sizes.
    #[must_use]
    pub fn size(&self, model: &ModelConfig) -> AdapterSize {
        let modules = self.modules().iter().map(|(site, module)| (*site, module.rank()));
        AdapterSize::new(modules, self.variant.name, self.tables().num_parameters(), model)
    }
}
