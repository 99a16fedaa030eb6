/* version.h - the one place that names the version: --version, /version, system_fingerprint. */
#ifndef URCHIN_CONFIG_VERSION_H
#define URCHIN_CONFIG_VERSION_H

#define URCHIN_VERSION "0.1.0"

#endif
