package gateway

import (
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
)

func TestGatewayConformance(t *testing.T) { conformance.RunConformance(t) }
