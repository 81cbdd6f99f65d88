//! How to reach Close.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use url::Url;

#[derive(Clone, Debug)]
pub struct Settings {
    /// The base of the API, ending in a slash: `https://api.close.com/api/v1/`.
    pub url: Url,
    pub api_key: SecretString,
    /// The timeout of one call.
    pub timeout: Duration,
    /// The part of Close's rate limits to use, above 0 and at most 1. The rest is for other integrations.
    pub share: f64,
}

impl Settings {
    /// Whether both have the same key, and so the same organization. Two empty keys are not the same.
    pub fn is_same_key(&self, other: &Self) -> bool {
        let [key, others] = [self, other].map(|settings| settings.api_key.expose_secret());
        !key.is_empty() && self.url == other.url && key == others
    }
}

impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        let parts = |Self { url, api_key, timeout, share }: &Self| {
            (url.clone(), api_key.expose_secret().to_owned(), *timeout, *share)
        };
        parts(self) == parts(other)
    }
}
