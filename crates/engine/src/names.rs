//! Names for sandboxes that were given none.

const SCIENTISTS: [&str; 48] = [
    "archimedes",
    "avogadro",
    "babbage",
    "bohr",
    "boole",
    "boltzmann",
    "cantor",
    "carson",
    "cavendish",
    "chandra",
    "church",
    "curie",
    "darwin",
    "dijkstra",
    "dirac",
    "einstein",
    "euclid",
    "euler",
    "faraday",
    "fermi",
    "feynman",
    "franklin",
    "galileo",
    "gauss",
    "goodall",
    "hamilton",
    "hawking",
    "hertz",
    "hilbert",
    "hopper",
    "hypatia",
    "kepler",
    "knuth",
    "lamarr",
    "leibniz",
    "liskov",
    "lovelace",
    "maxwell",
    "meitner",
    "mendel",
    "newton",
    "noether",
    "pascal",
    "planck",
    "ramanujan",
    "shannon",
    "tesla",
    "turing",
];

/// A name that `taken` does not know, made from `seed`.
pub(crate) fn generate(seed: u64, taken: impl Fn(&str) -> bool) -> String {
    let index = usize::try_from(seed % SCIENTISTS.len() as u64).unwrap_or(0);
    let plain = format!("sbx-{}", SCIENTISTS[index]);
    if !taken(&plain) {
        return plain;
    }
    // 2^32 suffixes: two in a row taken by chance does not happen, and a search ends all the same.
    (0..u64::from(u32::MAX))
        .map(|step| {
            format!(
                "{plain}-{:08x}",
                (seed >> 32).wrapping_add(step) & 0xffff_ffff
            )
        })
        .find(|name| !taken(name))
        .unwrap_or(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::SandboxName;

    #[test]
    fn every_name_is_a_name_and_free() {
        for seed in 0..200u64 {
            let name = generate(seed << 20 | seed, |_| false);
            assert!(name.parse::<SandboxName>().is_ok(), "{name}");
            let second = generate(seed, |other| other == name || !other.contains("-0"));
            assert!(second.parse::<SandboxName>().is_ok(), "{second}");
            assert_ne!(second, name);
        }
    }
}
