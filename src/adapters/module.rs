//! One projection's part of an adapter: A, B and what its variant has beside them.

use std::sync::OnceLock;

use candle_core::{Result, Tensor, Var};

use super::{
    AdapterError,
    site::{Matrix, tensor_name, vector_name},
    variant::Variant,
};
use crate::model::Site;
use crate::ops::{
    dora,
    lora::LoraPart,
    lora_dtype::LoraDtype,
    weight::{Weight, WeightIdentity},
};

/// One projection's part of an adapter.
#[derive(Debug)]
pub struct LoraModule {
    matrices: Matrices,
    vector: Option<Tensor>,
    variant: &'static Variant,
    /// What follows from a base's weight, of a frozen module.
    followed: OnceLock<Followed>,
    /// What the product is multiplied by: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub scale: f64,
    /// Alpha as configured.
    pub alpha: f64,
}

/// A and B are held once: as variables, or packed for serving.
#[derive(Debug)]
enum Matrices {
    Trained { a: Tensor, b: Tensor },
    Frozen(LoraPart),
}

/// Norms of a base's weight with A and B, and A and B with the factors that come of them.
#[derive(Debug)]
struct Followed {
    weight: WeightIdentity,
    norms: Tensor,
    part: LoraPart,
}

/// What a module is made of.
pub(super) struct RawModule {
    /// `[r, in]`
    pub(super) a: Tensor,
    /// `[out, r]`
    pub(super) b: Tensor,
    /// The variant's vector. `[out]`
    pub(super) vector: Option<Tensor>,
    pub(super) alpha: f64,
}

impl RawModule {
    /// What the product is multiplied by.
    pub(super) fn scale(&self, use_rslora: bool) -> Result<f64> {
        let rank = self.a.dim(0)? as f64;
        Ok(self.alpha / if use_rslora { rank.sqrt() } else { rank })
    }

    /// Its tensors by their names in the file.
    pub(super) fn named(&self, site: Site, variant: &Variant) -> Vec<(String, &Tensor)> {
        let mut named =
            vec![(tensor_name(site, Matrix::A), &self.a), (tensor_name(site, Matrix::B), &self.b)];
        if let (Some(vector), Some(name)) = (&self.vector, variant.vector) {
            named.push((vector_name(site, name), vector));
        }
        named
    }

    /// Refuses values of A and B that `dtype` has no number for.
    pub(super) fn check_range(
        &self,
        site: Site,
        dtype: LoraDtype,
    ) -> std::result::Result<(), AdapterError> {
        for (matrix, tensor) in [(Matrix::A, &self.a), (Matrix::B, &self.b)] {
            let values = if dtype.rounds() { tensor.flatten_all()?.to_vec1()? } else { Vec::new() };
            if let Some(value) = values.into_iter().find(|value| dtype.round(*value).is_infinite())
            {
                let tensor = tensor_name(site, matrix);
                return Err(AdapterError::OutOfRange { tensor, value, dtype: dtype.name() });
            }
        }
        Ok(())
    }
}

impl LoraModule {
    /// A module for serving, whose A and B are held as `dtype` has it.
    pub(super) fn frozen(
        raw: RawModule,
        (variant, use_rslora): (&'static Variant, bool),
        dtype: LoraDtype,
    ) -> Result<Self> {
        let scale = raw.scale(use_rslora)?;
        let matrices = Matrices::Frozen(LoraPart::new(&raw.a, &raw.b, scale, dtype)?);
        let RawModule { vector, alpha, .. } = raw;
        Ok(Self { matrices, vector, variant, followed: OnceLock::new(), scale, alpha })
    }

    /// A module whose tensors are trained; they go to `variables` by name.
    pub(super) fn trained(
        site: Site,
        raw: &RawModule,
        (variant, use_rslora): (&'static Variant, bool),
        variables: &mut Vec<(String, Var)>,
    ) -> Result<Self> {
        let mut variable = |name: String, tensor: &Tensor| {
            let variable = Var::from_tensor(tensor)?;
            let tensor = variable.as_tensor().clone();
            variables.push((name, variable));
            Ok::<_, candle_core::Error>(tensor)
        };
        let a = variable(tensor_name(site, Matrix::A), &raw.a)?;
        let b = variable(tensor_name(site, Matrix::B), &raw.b)?;
        let vector = match (&raw.vector, variant.vector) {
            (Some(vector), Some(name)) => Some(variable(vector_name(site, name), vector)?),
            _ => None,
        };
        Ok(Self {
            matrices: Matrices::Trained { a, b },
            vector,
            variant,
            followed: OnceLock::new(),
            scale: raw.scale(use_rslora)?,
            alpha: raw.alpha,
        })
    }

    /// `A [r, in]` and `B [out, r]`, f32; the variables themselves where they are trained.
    ///
    /// # Errors
    /// Where there is no memory for a copy.
    pub fn matrices(&self) -> Result<[Tensor; 2]> {
        match &self.matrices {
            Matrices::Trained { a, b } => Ok([a.clone(), b.clone()]),
            Matrices::Frozen(part) => part.matrices(),
        }
    }

    /// What the variant trains beside A and B, such as DoRA's magnitudes. `[out]`, f32
    #[must_use]
    pub fn vector(&self) -> Option<&Tensor> {
        self.vector.as_ref()
    }

    /// Rows of A.
    #[must_use]
    pub fn rank(&self) -> usize {
        match &self.matrices {
            Matrices::Trained { a, .. } => a.dims()[0],
            Matrices::Frozen(part) => part.rank(),
        }
    }

    /// Elements of all its tensors.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        let matrices = match &self.matrices {
            Matrices::Trained { a, b } => a.elem_count() + b.elem_count(),
            Matrices::Frozen(part) => part.num_elements(),
        };
        matrices + self.vector.as_ref().map_or(0, Tensor::elem_count)
    }

    /// Its tensors by their names in the file, f32.
    pub(super) fn named(&self, site: Site) -> Result<Vec<(String, Tensor)>> {
        let [a, b] = self.matrices()?;
        let mut named = vec![(tensor_name(site, Matrix::A), a), (tensor_name(site, Matrix::B), b)];
        if let (Some(vector), Some(name)) = (&self.vector, self.variant.vector) {
            named.push((vector_name(site, name), vector.clone()));
        }
        Ok(named)
    }

    pub(super) fn variant(&self) -> &'static Variant {
        self.variant
    }

    /// Packed A and B, where nobody trains them.
    pub(super) fn part(&self) -> Option<&LoraPart> {
        match &self.matrices {
            Matrices::Trained { .. } => None,
            Matrices::Frozen(part) => Some(part),
        }
    }

    /// The norms that `compute` says of the base's `weight`. A frozen module remembers them for the first that
    /// it meets.
    pub(super) fn once(
        &self,
        weight: &Weight,
        compute: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        if let Some(followed) = self.followed.get()
            && weight.is(&followed.weight)
        {
            return Ok(followed.norms.clone());
        }
        let norms = compute()?;
        if let (Some(part), Some(vector)) = (self.part(), &self.vector) {
            let part = part.with_factors(dora::factors(vector, &norms)?)?;
            // Of another base it stays as it is.
            let weight = weight.identity();
            let _ = self.followed.set(Followed { weight, norms: norms.clone(), part });
        }
        Ok(norms)
    }

    /// Whether a frozen module has met a base.
    pub(super) fn has_followed(&self) -> bool {
        self.followed.get().is_some()
    }

    /// A and B with the factors that come of the base's `weight`; `None` of another one than the first.
    pub(super) fn followed_part(&self, weight: &Weight) -> Option<&LoraPart> {
        let followed = self.followed.get().filter(|followed| weight.is(&followed.weight))?;
        Some(&followed.part)
    }
}
