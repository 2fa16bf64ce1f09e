// Package gateway runs the Gateway API's conformance suite, unmodified, against the cluster that KUBECONFIG names, which has Hanse and the Gateway API's
// CustomResourceDefinitions: `make conformance-gateway`. What Hanse claims is in options.yaml.
package gateway
