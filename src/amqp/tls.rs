//! TLS: whom we trust, and who we are. Only for `amqps://`.
//!
//! The files are read with the configuration, and again on SIGHUP. What they hold is proved then, for lapin
//! would pass over a file without certificates in silence and fail later, with an error that does not name it.

use std::io;

use lapin::ErrorKind;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use secrecy::{ExposeSecret, SecretString};

/// What TLS needs besides the system's trust store.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// More certificates to trust, PEM.
    ca: Option<String>,
    identity: Option<Identity>,
}

/// A client certificate with its chain and its key, both PEM.
#[derive(Clone, Debug)]
struct Identity {
    chain: String,
    key: SecretString,
}

/// Paths of PEM files; an empty one means none.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// Certificates to trust, in addition to the system's.
    pub ca: &'a str,
    /// A client certificate, followed by those between it and its CA, if any.
    pub cert: &'a str,
    /// Its key (PKCS#8, PKCS#1 or SEC1), not encrypted.
    pub key: &'a str,
}

impl<'a> Files<'a> {
    /// Those that are given, with the name of their setting.
    pub fn given(self) -> impl Iterator<Item = (&'static str, &'a str)> {
        let named = [("ca_file", self.ca), ("cert_file", self.cert), ("key_file", self.key)];
        named.into_iter().filter(|(_, path)| !path.is_empty())
    }
}

impl Tls {
    /// Reads the files and proves what they hold.
    ///
    /// # Errors
    /// Everything that is wrong: the file by the name of its setting, and the problem.
    pub fn read(files: Files<'_>) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        let mut read = |setting, path: &str| {
            let text = (!path.is_empty()).then(|| std::fs::read_to_string(path));
            let unreadable = |error| problems.push((setting, format!("\"{path}\" cannot be read: {error}")));
            text.and_then(|text| text.map_err(unreadable).ok())
        };
        let ca = read("ca_file", files.ca);
        let (chain, key) = (read("cert_file", files.cert), read("key_file", files.key));
        if let Some(Err(problem)) = ca.as_deref().map(prove_trust) {
            problems.push(("ca_file", format!("\"{}\" {problem}", files.ca)));
        }
        match (files.cert.is_empty(), files.key.is_empty()) {
            (false, true) => problems.push(("key_file", "is not set: `cert_file` needs its key".into())),
            (true, false) => {
                problems.push(("cert_file", "is not set: `key_file` needs its certificate".into()));
            }
            (true, true) | (false, false) => {}
        }
        let identity = chain.zip(key);
        if let Some(Err(problem)) = identity.as_ref().map(|(chain, key)| prove_identity(chain, key)) {
            problems.push(("cert_file", format!("\"{}\" with \"{}\" {problem}", files.cert, files.key)));
        }
        if problems.is_empty() {
            let identity = identity.map(|(chain, key)| Identity { chain, key: key.into() });
            Ok(Self { ca, identity })
        } else {
            Err(problems)
        }
    }

    pub(crate) fn for_lapin(&self) -> OwnedTLSConfig {
        OwnedTLSConfig {
            identity: self.identity.as_ref().map(|Identity { chain, key }| OwnedIdentity::PKCS8 {
                pem: chain.clone().into_bytes(),
                key: key.expose_secret().as_bytes().to_vec(),
            }),
            cert_chain: self.ca.clone(),
        }
    }
}

/// By what the files held when they were read: one that was renewed is another.
impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.for_lapin() == other.for_lapin()
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match certificates {
        Ok(none) if none.is_empty() => Err("holds no certificate in PEM".into()),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(format!("is no PEM: {error}")),
    }
}

fn prove_trust(pem: &str) -> Result<(), String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(pem)? {
        store
            .add(certificate)
            .map_err(|error| format!("holds a certificate that cannot be used: {error}"))?;
    }
    Ok(())
}

fn prove_identity(chain: &str, key: &str) -> Result<(), String> {
    let chain = certificates(chain)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|_| "is no certificate with its key: the key is not PEM, or encrypted".to_owned())?;
    CertifiedKey::from_der(chain, key, &ring::default_provider())
        .map(drop)
        .map_err(|error| format!("cannot be used: {error}"))
}

/// Why a broker ends a handshake.
const CLIENT_CERTIFICATE: &str = "RabbitMQ may ask for a client certificate of a CA that it trusts: \
                                  `amqp.tls.cert_file`, `amqp.tls.key_file`";

/// What went wrong on an encrypted connection and what to do about it, if TLS may be the reason.
pub(crate) fn explain(error: &lapin::Error) -> Option<String> {
    let ErrorKind::IOError(io) = error.kind() else { return None };
    match io.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(error) => Some(format!("{error}. {}", remedy(error))),
        // With TLS 1.3, a client without certificate is refused after the handshake; when it has sent
        // something meanwhile, all it may see is the end of the connection.
        None if matches!(io.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof) => {
            Some(format!("{error}. {CLIENT_CERTIFICATE}"))
        }
        None => None,
    }
}

fn remedy(error: &rustls::Error) -> &'static str {
    use rustls::Error::{AlertReceived, General, InvalidCertificate, InvalidMessage};
    // A system that trusts nobody is an error in general.
    if matches!(error, InvalidCertificate(CertificateError::UnknownIssuer) | General(_)) {
        "Set `amqp.tls.ca_file` (AMQP_TLS_CA_FILE) to the certificate of the CA that signed RabbitMQ's"
    } else if matches!(error, InvalidCertificate(_)) {
        "RabbitMQ's certificate must be in force and name the host in `amqp.url` (AMQP_URL)"
    } else if matches!(error, InvalidMessage(_)) {
        "Does this port speak TLS? By default, 5671 does"
    } else if matches!(error, AlertReceived(_)) {
        CLIENT_CERTIFICATE
    } else {
        "RabbitMQ and close-sync (TLS 1.2 and 1.3) do not agree"
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// What is wrong with files of these contents.
    fn problems(ca: Option<&str>, cert: Option<&str>, key: Option<&str>) -> Vec<(&'static str, String)> {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: Option<&str>| {
            let Some(text) = text else { return String::new() };
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (ca, cert, key) = (write("ca", ca), write("cert", cert), write("key", key));
        let read = Tls::read(Files { ca: &ca, cert: &cert, key: &key });
        let folder = format!("{}/", directory.path().display());
        let told = read.err().unwrap_or_default().into_iter();
        told.map(|(setting, problem)| (setting, problem.replace(&folder, ""))).collect()
    }

    #[test]
    fn files_are_proved_when_they_are_read() {
        let made = || {
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
            (certificate.pem(), key.serialize_pem())
        };
        let (cert, key) = made();
        assert_eq!(problems(None, None, None), []);
        assert_eq!(problems(Some(&cert), Some(&cert), Some(&key)), []);

        let none = ("ca_file", "\"ca\" holds no certificate in PEM".to_owned());
        let lonely = ("key_file", "is not set: `cert_file` needs its key".to_owned());
        assert_eq!(problems(Some(&key), Some(&cert), None), [none, lonely]);
        let lonely = ("cert_file", "is not set: `key_file` needs its certificate".to_owned());
        assert_eq!(problems(None, None, Some(&key)), [lonely]);
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (key, cert, told) in [
            (made().1.as_str(), cert.as_str(), "cannot be used: keys may not be consistent: KeyMismatch"),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----", &cert, "the key is not PEM, or encrypted"),
            (&key, broken, "cannot be used: invalid peer certificate: BadEncoding"),
        ] {
            let found = problems(None, Some(cert), Some(key));
            let [("cert_file", problem)] = found.as_slice() else { panic!("{found:?}") };
            assert!(problem.contains(told), "{problem}");
        }
        assert!(problems(Some(broken), None, None)[0].1.contains("cannot be used"));
        let missing = Tls::read(Files { ca: "/nowhere/ca.pem", cert: "", key: "" }).unwrap_err();
        assert!(missing[0].1.starts_with("\"/nowhere/ca.pem\" cannot be read"), "{missing:?}");
    }

    #[test]
    fn a_key_is_not_shown() {
        let tls = Tls { ca: None, identity: Some(Identity { chain: "c".into(), key: "secret".into() }) };
        assert!(!format!("{tls:?}").contains("secret"));
    }
}
