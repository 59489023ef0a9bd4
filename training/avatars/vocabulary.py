# ruff: noqa: RUF001 - Turkish writes a dotless i.
"""Vocabulary of the synthetic voices, in twelve languages.

Every fourth word of a language belongs to the held-out split and the others to the training split,
so no held-out word occurs in training.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WordList:
    """Words of one language.

    Attributes:
        words: all words, without repetition.
    """

    words: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        """Return the words of a split, `train` or `heldout`."""
        is_heldout = split == "heldout"
        return tuple(
            word for place, word in enumerate(self.words) if (place % 4 == 3) == is_heldout
        )


def _words(text: str) -> WordList:
    return WordList(tuple(dict.fromkeys(text.split())))


WORDS: dict[str, WordList] = {
    "en": _words(
        "water morning people river simple garden window yellow singing mountain paper little "
        "hello friend evening market sugar pocket silver music answer button castle doctor "
        "early father guitar happy island jungle kitchen lemon machine number orange picture "
        "question rabbit summer table uncle village winter yesterday zebra animal bottle candle "
        "dinner engine flower gentle hammer invite jacket kettle ladder mirror needle office "
        "pepper quiet rocket saddle ticket under velvet whistle young about before children "
        "door every forest good house ice join keep love moon never open place quick read "
        "smile tree use very walk year always because carry dance eat follow green high into "
        "jump know listen make night over play round see thank up visit we always you apple "
        "bread cheese drink egg fish grape honey juice lamp meadow noise ocean piano queen rain "
        "story teacher umbrella voice weather box yes zero air blue cloud deep earth fire gold "
        "heart idea join key light map news old park road sea time wood ship shoe measure "
        "pleasure usual vision thing bath mother wash church judge cherry boy toy cow found"
    ),
    "de": _words(
        "Wasser Morgen Leute Fluss einfach Garten Fenster gelb singen Berg Papier klein Freund "
        "Abend Markt Zucker Tasche Silber Musik Antwort Knopf Schloss Arzt Vater Insel Küche "
        "Zitrone Maschine Nummer Bild Frage Hase Sommer Tisch Onkel Dorf Winter gestern Tier "
        "Flasche Kerze Blume sanft Hammer Jacke Leiter Spiegel Nadel Büro Pfeffer ruhig Straße "
        "über Pferd schön möglich heute Zeit Haus Baum Licht Feuer"
    ),
    "fr": _words(
        "eau matin gens rivière simple jardin fenêtre jaune chanter montagne papier petit ami "
        "soir marché sucre poche argent musique réponse bouton château docteur père île cuisine "
        "citron machine numéro image question lapin été table oncle village hiver hier animal "
        "bouteille bougie fleur doux marteau veste échelle miroir aiguille bureau poivre calme "
        "rue beau possible temps maison arbre lumière feu oiseau"
    ),
    "es": _words(
        "agua mañana gente río simple jardín ventana amarillo cantar montaña papel pequeño amigo "
        "tarde mercado azúcar bolsillo plata música respuesta botón castillo médico padre isla "
        "cocina limón máquina número imagen pregunta conejo verano mesa tío pueblo invierno ayer "
        "animal botella vela flor suave martillo chaqueta escalera espejo aguja oficina pimienta "
        "tranquilo calle hermoso posible tiempo casa árbol luz fuego pájaro"
    ),
    "it": _words(
        "acqua mattina gente fiume semplice giardino finestra giallo cantare montagna carta "
        "piccolo amico sera mercato zucchero tasca argento musica risposta bottone castello "
        "medico padre isola cucina limone macchina numero immagine domanda coniglio estate "
        "tavolo zio villaggio inverno ieri animale bottiglia candela fiore dolce martello giacca "
        "scala specchio ago ufficio pepe calmo strada bello possibile tempo casa albero luce"
    ),
    "pt": _words(
        "água manhã gente rio simples jardim janela amarelo cantar montanha papel pequeno amigo "
        "tarde mercado açúcar bolso prata música resposta botão castelo médico pai ilha cozinha "
        "limão máquina número imagem pergunta coelho verão mesa tio aldeia inverno ontem animal "
        "garrafa vela flor suave martelo casaco escada espelho agulha escritório pimenta calmo"
    ),
    "nl": _words(
        "water morgen mensen rivier eenvoudig tuin venster geel zingen berg papier klein vriend "
        "avond markt suiker zak zilver muziek antwoord knop kasteel dokter vader eiland keuken "
        "citroen machine nummer beeld vraag konijn zomer tafel oom dorp winter gisteren dier "
        "fles kaars bloem zacht hamer jas ladder spiegel naald kantoor peper rustig straat"
    ),
    "pl": _words(
        "woda rano ludzie rzeka prosty ogród okno żółty śpiewać góra papier mały przyjaciel "
        "wieczór rynek cukier kieszeń srebro muzyka odpowiedź guzik zamek lekarz ojciec wyspa "
        "kuchnia cytryna maszyna numer obraz pytanie królik lato stół wujek wieś zima wczoraj "
        "zwierzę butelka świeca kwiat młotek kurtka drabina lustro igła biuro pieprz spokojny"
    ),
    "sv": _words(
        "vatten morgon folk flod enkel trädgård fönster gul sjunga berg papper liten vän kväll "
        "marknad socker ficka silver musik svar knapp slott läkare far ö kök citron maskin "
        "nummer bild fråga kanin sommar bord farbror by vinter igår djur flaska ljus blomma mjuk "
        "hammare jacka stege spegel nål kontor peppar lugn gata vacker"
    ),
    "fi": _words(
        "vesi aamu ihmiset joki helppo puutarha ikkuna keltainen laulaa vuori paperi pieni "
        "ystävä ilta tori sokeri tasku hopea musiikki vastaus nappi linna lääkäri isä saari "
        "keittiö sitruuna kone numero kuva kysymys kani kesä pöytä setä kylä talvi eilen eläin "
        "pullo kynttilä kukka pehmeä vasara takki tikkaat peili neula toimisto pippuri hiljainen"
    ),
    "tr": _words(
        "su sabah insanlar nehir basit bahçe pencere sarı söylemek dağ kağıt küçük arkadaş akşam "
        "pazar şeker cep gümüş müzik cevap düğme kale doktor baba ada mutfak limon makine numara "
        "resim soru tavşan yaz masa amca köy kış dün hayvan şişe mum çiçek yumuşak çekiç ceket "
        "merdiven ayna iğne ofis biber sakin sokak güzel"
    ),
    "id": _words(
        "air pagi orang sungai mudah taman jendela kuning bernyanyi gunung kertas kecil teman "
        "malam pasar gula kantong perak musik jawaban kancing istana dokter ayah pulau dapur "
        "lemon mesin nomor gambar pertanyaan kelinci musim meja paman desa dingin kemarin hewan "
        "botol lilin bunga lembut palu jaket tangga cermin jarum kantor lada tenang jalan"
    ),
}
