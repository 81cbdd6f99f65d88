//! Workarounds for lapin. Each file names the upstream change that makes it unnecessary.

pub(crate) mod frame_sanitizer;
pub(crate) mod server_properties;
pub(crate) mod stream;
