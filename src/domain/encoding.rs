//! The content encoding of a message: the AMQP property `content_encoding` and the bytes that it describes.
//!
//! Producers compress bodies (`gzip`, `deflate`), and many clients put the name of a character set there (`utf-8`), which
//! is no compression. The property is not always true. A body that looks like a JSON object is taken as it is, whatever the
//! property says: no compressed body starts with `{` and ends with `}`.
//!
//! Memory is bounded: decoding stops at the limit, so a small body that expands to gigabytes costs no more than a
//! message of the largest size.

use std::borrow::Cow;
use std::io::Read;

use flate2::bufread::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// The limit for decoding where a worker's own limit is not known: the largest message of RabbitMQ 4 by default.
pub const TOOL_LIMIT: usize = 16 << 20;

/// A body as it was sent, with its encoding.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    pub bytes: &'a [u8],
    /// The AMQP property `content_encoding`.
    pub encoding: Option<&'a str>,
}

impl<'a> From<&'a [u8]> for Payload<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { bytes, encoding: None }
    }
}

impl<'a> From<&'a Vec<u8>> for Payload<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        bytes.as_slice().into()
    }
}

/// Why a body cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodingError {
    /// The name is not repeated, because a producer chose it.
    #[error("the `content_encoding` is not supported; publish the body plain, or with `gzip` or `deflate`")]
    Unsupported,
    #[error("the `content_encoding` is {0}, but the body is not valid {0} or is truncated")]
    Corrupt(&'static str),
    #[error("the decompressed message has more than the {limit} bytes allowed")]
    TooLarge { limit: usize },
}

impl EncodingError {
    /// The label in the fingerprint of a dead letter.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unsupported => "unsupported_encoding",
            Self::Corrupt(_) => "corrupt_encoding",
            Self::TooLarge { .. } => "too_large",
        }
    }
}

/// What a content encoding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Plain,
    Gzip,
    Deflate,
    Unsupported,
}

impl Coding {
    fn of(encoding: &str) -> Self {
        // Names of RFC 9110 (8.4.1), of MIME, and of character sets that contain ASCII.
        match encoding.trim().to_ascii_lowercase().as_str() {
            "" | "identity" | "none" | "7bit" | "8bit" | "binary" | "utf-8" | "utf8" | "ascii"
            | "us-ascii" => Self::Plain,
            "gzip" | "x-gzip" => Self::Gzip,
            "deflate" => Self::Deflate,
            _ => Self::Unsupported,
        }
    }
}

impl<'a> Payload<'a> {
    /// The body without its compression, at most `limit` bytes. A plain body is returned whatever its size.
    ///
    /// # Errors
    /// Why it cannot be decoded, without content of the message.
    pub fn decode(self, limit: usize) -> Result<Cow<'a, [u8]>, EncodingError> {
        let Self { bytes, encoding } = self;
        let coding = Coding::of(encoding.unwrap_or_default());
        if coding == Coding::Plain || looks_like_json(bytes) {
            return Ok(bytes.into());
        }
        let decoded = match coding {
            Coding::Plain | Coding::Unsupported => return Err(EncodingError::Unsupported),
            Coding::Gzip => decompress(MultiGzDecoder::new(bytes), limit, "gzip")?,
            // The name stands for the zlib format. Some producers send the bare stream that is inside it.
            Coding::Deflate if is_zlib(bytes) => {
                let mut decoder = ZlibDecoder::new(bytes);
                let text = decompress(&mut decoder, limit, "deflate")?;
                ended(decoder.get_ref(), "deflate")?;
                text
            }
            Coding::Deflate => {
                let mut decoder = DeflateDecoder::new(bytes);
                let text = decompress(&mut decoder, limit, "deflate")?;
                ended(decoder.get_ref(), "deflate")?;
                text
            }
        };
        Ok(decoded.into())
    }
}

fn looks_like_json(bytes: &[u8]) -> bool {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii();
    text.starts_with(b"{") && text.ends_with(b"}")
}

/// Whether the bytes start with the header of the zlib format (RFC 1950, 2.2).
fn is_zlib(bytes: &[u8]) -> bool {
    matches!(*bytes, [method, flags, ..] if method & 0x0f == 8 && u16::from_be_bytes([method, flags]) % 31 == 0)
}

/// An error if something follows the compressed stream.
fn ended(rest: &[u8], name: &'static str) -> Result<(), EncodingError> {
    if rest.is_empty() { Ok(()) } else { Err(EncodingError::Corrupt(name)) }
}

fn decompress(mut decoder: impl Read, limit: usize, name: &'static str) -> Result<Vec<u8>, EncodingError> {
    let mut text = Vec::new();
    let mut chunk = [0; 8 << 10];
    loop {
        let read = match decoder.read(&mut chunk) {
            Ok(0) => return Ok(text),
            Ok(read) => read,
            Err(_) => return Err(EncodingError::Corrupt(name)),
        };
        let length = text.len() + read;
        if length > limit {
            return Err(EncodingError::TooLarge { limit });
        }
        if length > text.capacity() {
            // Doubles like a vector does, but not beyond the limit.
            let capacity = text.capacity().saturating_mul(2).clamp(length, limit);
            text.reserve_exact(capacity - text.len());
        }
        text.extend_from_slice(&chunk[..read]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use proptest::prelude::*;

    use super::*;

    const TEXT: &[u8] = br#"{"type":"identify","userId":"u1"}"#;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(text: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn raw_deflate(text: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn decode(bytes: &[u8], encoding: &str, limit: usize) -> Result<Vec<u8>, EncodingError> {
        Payload { bytes, encoding: Some(encoding) }.decode(limit).map(Cow::into_owned)
    }

    #[test]
    fn a_body_is_decoded_according_to_its_encoding() {
        let members = [gzip(&TEXT[..9]), gzip(&TEXT[9..])].concat();
        let spaced = [b" ", TEXT].concat();
        let cases: [(&[u8], &str); 17] = [
            (TEXT, ""),
            (TEXT, "identity"),
            (TEXT, "UTF-8"),
            (TEXT, "utf8"),
            (TEXT, "8bit"),
            (&gzip(TEXT), "gzip"),
            (&gzip(TEXT), " GZip "),
            (&gzip(TEXT), "x-gzip"),
            (&members, "gzip"),
            (&zlib(TEXT), "deflate"),
            (&zlib(TEXT), "Deflate"),
            (&raw_deflate(TEXT), "deflate"),
            (&raw_deflate(&spaced), "deflate"),
            // A property that is not true.
            (TEXT, "gzip"),
            (TEXT, "deflate"),
            (TEXT, "br"),
            (TEXT, "application/json"),
        ];
        for (bytes, encoding) in cases {
            let decoded = decode(bytes, encoding, TEXT.len() + 1).unwrap();
            assert_eq!(decoded.trim_ascii(), TEXT, "{encoding} {bytes:?}");
        }
        assert_eq!(&*Payload::from(TEXT).decode(0).unwrap(), TEXT);
    }

    #[test]
    fn a_body_that_cannot_be_decoded_is_refused_with_the_reason() {
        use EncodingError::{Corrupt, Unsupported};
        let (zipped, deflated, raw) = (gzip(TEXT), zlib(TEXT), raw_deflate(TEXT));
        let mut wrong_checksum = zipped.clone();
        let crc = wrong_checksum.len() - 8;
        wrong_checksum[crc] ^= 1;
        let trailing = |bytes: &[u8]| [bytes, b"x"].concat();
        let cases: [(&[u8], &str, EncodingError); 14] = [
            (&zipped[..zipped.len() - 1], "gzip", Corrupt("gzip")),
            (&zipped[..12], "gzip", Corrupt("gzip")),
            (&wrong_checksum, "gzip", Corrupt("gzip")),
            (&trailing(&zipped), "gzip", Corrupt("gzip")),
            (b"no gzip", "gzip", Corrupt("gzip")),
            (b"", "gzip", Corrupt("gzip")),
            (&deflated[..deflated.len() - 1], "deflate", Corrupt("deflate")),
            (&trailing(&deflated), "deflate", Corrupt("deflate")),
            (&raw[..raw.len() - 1], "deflate", Corrupt("deflate")),
            (&trailing(&raw), "deflate", Corrupt("deflate")),
            (b"no deflate", "deflate", Corrupt("deflate")),
            (&zipped, "br", Unsupported),
            (&zipped, "zstd", Unsupported),
            (&gzip(&zipped), "gzip, gzip", Unsupported),
        ];
        for (bytes, encoding, error) in cases {
            assert_eq!(decode(bytes, encoding, 1 << 20), Err(error), "{encoding} {bytes:?}");
        }
    }

    #[test]
    fn a_bomb_costs_no_more_than_the_limit() {
        let zeros = vec![b' '; 64 << 20];
        for (bytes, encoding) in
            [(gzip(&zeros), "gzip"), (zlib(&zeros), "deflate"), (raw_deflate(&zeros), "deflate")]
        {
            assert!(bytes.len() < 100_000, "{}", bytes.len());
            assert_eq!(decode(&bytes, encoding, 1 << 20), Err(EncodingError::TooLarge { limit: 1 << 20 }));
        }
        let limit = 100_000;
        let decoded = decompress(MultiGzDecoder::new(&gzip(&zeros[..limit])[..]), limit, "gzip").unwrap();
        assert_eq!((decoded.len(), decoded.capacity()), (limit, limit));
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_does_not_panic_or_exceed_the_limit(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            zipped in any::<bool>(),
            encoding in "gzip|deflate|br|",
        ) {
            let bytes = if zipped { gzip(&bytes) } else { bytes };
            if let Ok(decoded) = decode(&bytes, &encoding, 150) {
                prop_assert!(decoded.len() <= 150 || decoded == bytes);
            }
        }
    }
}
