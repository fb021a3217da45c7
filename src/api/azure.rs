//! Azure's addresses, turned into OpenAI's before anything else looks at them.
//!
//! `/openai/deployments/NAME/REST` is `/v1/REST` with NAME as the model, `/openai/v1/REST` and
//! `/openai/REST` are `/v1/REST`, and `api-version` is nobody's business here.

use axum::{extract::Request, http::Uri};

use super::{
    azure_form::{AzureForm, Deployment},
    query::decoded,
};

/// The layer. Whatever does not begin as Azure's addresses do is left alone.
pub(crate) async fn understand_azure(mut request: Request) -> Request {
    let Some((uri, deployment)) = plain_address(request.uri()) else { return request };
    *request.uri_mut() = uri;
    request.extensions_mut().insert(AzureForm);
    if let Some(deployment) = deployment {
        request.extensions_mut().insert(Deployment(deployment));
    }
    request
}

/// OpenAI's form of an address of Azure's, and the deployment in it.
fn plain_address(uri: &Uri) -> Option<(Uri, Option<String>)> {
    let rest = uri.path().strip_prefix("/openai/")?;
    let (rest, deployment) = match rest.strip_prefix("deployments/").and_then(|r| r.split_once('/'))
    {
        Some((name, rest)) => (rest, Some(decoded(name))),
        None => (rest.strip_prefix("v1/").unwrap_or(rest), None),
    };
    let query = uri.query().unwrap_or_default().split('&');
    let kept: Vec<&str> = query
        .filter(|pair| !pair.is_empty() && pair.split('=').next() != Some("api-version"))
        .collect();
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    // Made of parts of an address, so it is one.
    let uri = format!("/v1/{rest}{query}").parse().ok()?;
    Some((uri, deployment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_leads_to_its_plain_address() {
        for (azure, plain, deployment) in [
            ("/openai/files?api-version=1", "/v1/files", None),
            ("/openai/files?limit=2&api-version=1&after=x", "/v1/files?limit=2&after=x", None),
            ("/openai/v1/chat/completions", "/v1/chat/completions", None),
            ("/openai/v1/models/ft%3Aa", "/v1/models/ft%3Aa", None),
            (
                "/openai/deployments/my%20one/chat/completions?api-version=1",
                "/v1/chat/completions",
                Some("my one"),
            ),
            ("/openai/deployments", "/v1/deployments", None),
            ("/openai/../v1/files", "/v1/../v1/files", None),
            ("/openai/%2e%2e/files", "/v1/%2e%2e/files", None),
            ("/openai/openai/files", "/v1/openai/files", None),
            ("/openai/", "/v1/", None),
        ] {
            let (uri, found) = plain_address(&azure.parse().unwrap()).unwrap();
            assert_eq!(
                (uri.to_string().as_str(), found.as_deref()),
                (plain, deployment),
                "{azure}"
            );
        }
        for other in ["/v1/files", "/openai", "/openaix/files", "/", "/x/openai/files"] {
            assert_eq!(plain_address(&other.parse().unwrap()), None, "{other}");
        }
    }
}
