//! Works around lapin. Each file says which upstream change would delete it.

pub(crate) mod frame_sanitizer;
pub(crate) mod server_properties;
pub(crate) mod stream;
