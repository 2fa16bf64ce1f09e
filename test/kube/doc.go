// Package kube holds Hanse against real Kubernetes programs. `make test-kube` builds them at a fixed version, in the module beside
// this file, and runs it; without them there is nothing to test, and it says so.
package kube
