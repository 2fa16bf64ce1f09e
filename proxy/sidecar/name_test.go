package sidecar

import "testing"

func TestAuthorityOf(t *testing.T) {
	for written, want := range map[string]string{
		"payments":                               "payments.shop.svc.clusterset.local:80",
		"payments:8080":                          "payments.shop.svc.clusterset.local:8080",
		"Payments.Shop:8080":                     "payments.shop.svc.clusterset.local:8080",
		"payments.billing":                       "payments.billing.svc.clusterset.local:80",
		"payments.billing.svc":                   "payments.billing.svc.clusterset.local:80",
		"payments.billing.svc.clusterset.local.": "payments.billing.svc.clusterset.local:80",
		"payments.billing.svc.cluster.local:1":   "payments.billing.svc.cluster.local:1",
		"svc:1":                                  "svc.shop.svc.clusterset.local:1",
		"":                                       "",
		":80":                                    "",
		"payments:0":                             "",
		"payments:65536":                         "",
		"payments:+80":                           "",
		"payments:http":                          "",
		"10.0.0.1:80":                            "",
		"[::1]:80":                               "",
		"a.b.c":                                  "",
		"-payments":                              "",
		"pay_ments":                              "",
		"payments..svc.clusterset.local":         "",
		"evil.example.com":                       "",
		"payments.shop.svc.clusterset.local.evil": "",
		"payments/x:80": "",
		"payments.shop.svc.clusterset.local:80:80": "",
	} {
		got, err := authorityOf(written, "shop", 80)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", written, got, err, want)
		}
	}
}
