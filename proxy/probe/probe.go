// Package probe answers the kubelet, who has no identity, for a sidecar and for the application behind it.
//
//	kubelet ─► Server (:15021) ─┬─ /readyz: the sidecar itself
//	                            └─ a path of a Check ─► the application, in the pod; its answer is passed on
//
// So the application's own ports stay behind mutual TLS.
package probe

import "strings"

// Check is one question to the application; exactly one of the three.
type Check struct {
	HTTP *HTTP `json:"http,omitempty"`
	GRPC *GRPC `json:"grpc,omitempty"`
	TCP  *TCP  `json:"tcp,omitempty"`
	Hook bool  `json:"hook,omitempty"` // a hook of the application's life: it is the kubelet's alone, and waited for as long as that waits
}

// HTTP is a GET; answers from 200 to 399 are good, as the kubelet has it.
type HTTP struct {
	Port    uint16      `json:"port"`              // of the application
	Path    string      `json:"path"`              // what is asked for
	HTTPS   bool        `json:"https,omitempty"`   // its certificate is not verified, as the kubelet has it
	Headers [][2]string `json:"headers,omitempty"` // [name, value]
}

// GRPC asks by gRPC's health protocol (grpc.health.v1) for a service, which may be "".
type GRPC struct {
	Port    uint16 `json:"port"`              // of the application
	Service string `json:"service,omitempty"` // that is asked about
}

// TCP connects.
type TCP struct {
	Port uint16 `json:"port"` // of the application
}

// maxChecks is far beyond three for each container.
const maxChecks = 256

// Validate tells bad of every fault of checks by path; field is before a path.
func Validate(checks map[string]Check, field string, bad func(field, format string, args ...any)) {
	if len(checks) > maxChecks {
		bad(field, "%d of them: at most %d", len(checks), maxChecks)
	}
	for path, k := range checks {
		field := field + "[" + path + "]"
		if !strings.HasPrefix(path, "/") || path == "/readyz" {
			bad(field, "want a path other than /readyz")
		}
		kinds, port := 0, uint16(0)
		if k.HTTP != nil {
			kinds, port = kinds+1, k.HTTP.Port
			if !strings.HasPrefix(k.HTTP.Path, "/") {
				bad(field+".http.path", "%q does not begin with /", k.HTTP.Path)
			}
		}
		if k.GRPC != nil {
			kinds, port = kinds+1, k.GRPC.Port
		}
		if k.TCP != nil {
			kinds, port = kinds+1, k.TCP.Port
		}
		if kinds != 1 || port == 0 {
			bad(field, "want one of http, grpc and tcp, with a port")
		}
	}
}
