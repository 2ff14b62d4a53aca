#!/usr/bin/env bash
# Says where a Chromium is, and installs Debian's where there is none and this may be done. Ends with 1 where none can
# be had. No browser is downloaded from anywhere else.
set -euo pipefail

found() { command -v "${MOLORA_CHROMIUM:-chromium}" || command -v chromium-browser; }

found && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
	echo "==> Debian's Chromium (once)" >&2
	export DEBIAN_FRONTEND=noninteractive
	patience="-o Acquire::http::Timeout=20 -o Acquire::Retries=1"
	# shellcheck disable=SC2086
	{
		timeout 120 apt-get $patience update &&
			timeout 300 apt-get $patience install -y --no-install-recommends chromium
	} >&2 || true
fi
found
