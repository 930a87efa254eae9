package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"time"

	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// The lifetime of a test cluster. Nothing renews the certificates.
const lifetime = 30 * 24 * time.Hour

type request struct {
	// File is the path without its ending: .crt and .key are written.
	File string `json:"file"`
	// User becomes the common name, and Groups the organizations: Kubernetes reads its users and groups there.
	User   string   `json:"user"`
	Groups []string `json:"groups"`
	// Hosts are names and addresses, for a certificate that a server shows.
	Hosts []string `json:"hosts"`
}

// writeCertificates reads {"authority": FILE, "certificates": [...]} and writes each of them, signed by the authority,
// which is made if its file is not there.
func writeCertificates(input io.Reader) error {
	var order struct {
		Authority    string    `json:"authority"`
		Certificates []request `json:"certificates"`
	}
	if err := json.NewDecoder(input).Decode(&order); err != nil {
		return fmt.Errorf("certificates takes JSON on its standard input: %w", err)
	}
	authority, signer, err := loadOrMakeAuthority(order.Authority)
	if err != nil {
		return err
	}
	for _, each := range order.Certificates {
		if err := writeCertificate(each, authority, signer); err != nil {
			return fmt.Errorf("certificate of %s: %w", each.User, err)
		}
	}
	return nil
}

func loadOrMakeAuthority(file string) (*x509.Certificate, crypto.Signer, error) {
	if _, err := os.Stat(file + ".crt"); err == nil {
		certificates, err := cert.CertsFromFile(file + ".crt")
		if err != nil {
			return nil, nil, err
		}
		key, err := keyutil.PrivateKeyFromFile(file + ".key")
		if err != nil {
			return nil, nil, err
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, nil, fmt.Errorf("%s.key cannot sign", file)
		}
		return certificates[0], signer, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := x509.Certificate{
		Subject:               pkix.Name{CommonName: "sonoforge test cluster"},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	made, err := sign(&template, &template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	return made, key, write(file, made, key)
}

func writeCertificate(wanted request, authority *x509.Certificate, signer crypto.Signer) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := x509.Certificate{
		Subject:     pkix.Name{CommonName: wanted.User, Organization: wanted.Groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, host := range wanted.Hosts {
		if address := net.ParseIP(host); address != nil {
			template.IPAddresses = append(template.IPAddresses, address)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	}
	made, err := sign(&template, authority, key.Public(), signer)
	if err != nil {
		return err
	}
	return write(wanted.File, made, key)
}

func sign(template, parent *x509.Certificate, key crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template.SerialNumber = serial
	// Clocks of containers and hosts differ by a little.
	template.NotBefore, template.NotAfter = now.Add(-5*time.Minute), now.Add(lifetime)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func write(file string, certificate *x509.Certificate, key *ecdsa.PrivateKey) error {
	text, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return err
	}
	if err := keyutil.WriteKey(file+".key", text); err != nil { // readable by this user only
		return err
	}
	public, err := cert.EncodeCertificates(certificate)
	if err != nil {
		return err
	}
	return cert.WriteCert(file+".crt", public)
}
