//! The marks of a request that came in one of Azure's forms, for the few answers that differ.

/// Put into a request's extensions by the layer that understands Azure's paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AzureForm;

/// The deployment that a path names: the model of the request, whatever its body says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deployment(pub(crate) String);
