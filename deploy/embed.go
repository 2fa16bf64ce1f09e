// Package deploy holds configuration that works: systemd units, and the demo's own files, which are the samples of every part.
package deploy

import "embed"

// Demo holds the demo's files as text/template: hansed.yaml, gateway.yaml, sidecar.yaml and mesh.yaml. Package demo says with what
// they are filled in.
//
//go:embed demo/*.yaml.tmpl
var Demo embed.FS

// Chart is the Helm chart, under chart/hanse. Package cmd/internal/chart renders it.
//
//go:embed all:chart/hanse
var Chart embed.FS
