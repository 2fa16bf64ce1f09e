package sidecar

import (
	"net/netip"
	"testing"
)

// TestAnyPort: ports that nobody named lead to the workload's own address, once each, and only where that is asked for.
func TestAnyPort(t *testing.T) {
	s := &Sidecar{cfg: Config{Workload: netip.MustParseAddr("10.1.2.3"), Apps: map[uint16]string{80: "127.0.0.1:8080"}}}
	s.apps.open(s)
	defer s.apps.close()
	if s.apps.declared(s, 81) != nil {
		t.Error("an application is made up")
	}
	s.cfg.AnyPort = true
	if a := s.apps.declared(s, 81); a == nil || a.address != "10.1.2.3:81" || s.apps.declared(s, 81) != a {
		t.Errorf("port 81: %+v", a)
	}
	if a := s.apps.declared(s, 80); a.address != "127.0.0.1:8080" {
		t.Errorf("port 80: %s", a.address)
	}
}
